"""The Complete Journey (84.51 degrees): what households bought at a grocer in 2017, from the R package of that name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from brewjax.download import DownloadError

FILES = ("transactions_sample", "products", "demographics")
PROFILE = ("age", "income", "home_ownership", "marital_status", "household_size", "kids_count")


def read_completejourney(source: Path | None) -> dict[str, pa.Table]:
    """The tables of a local copy: households, the products they bought, and each line of a basket.

    Raises:
      DownloadError: there is no copy, or a file of it is missing.
      ImportError: pyreadr, which reads R's files, is not installed.
    """
    if source is None or not source.is_dir():
        names = ", ".join(f"{name}.rda" for name in FILES)
        raise DownloadError(f"give a copy of completejourney with --from: a folder with {names}")
    if missing := [f"{name}.rda" for name in FILES if not (source / f"{name}.rda").is_file()]:
        raise DownloadError(f"{source} has no {', '.join(missing)}")
    try:
        import pyreadr
    except ImportError as error:
        raise ImportError("completejourney's files are R's; to read them: pip install pyreadr") from error
    lines, products, households = (pyreadr.read_r(str(source / f"{name}.rda"))[name] for name in FILES)
    # A product that is scanned twice is one line of a basket, with the quantities added.
    keys = ["household_id", "product_id", "basket_id", "transaction_timestamp"]
    lines = lines.groupby(keys, as_index=False)[["quantity", "sales_value"]].sum()
    events = pa.table(
        {
            "member_id": lines["household_id"].tolist(),
            "item_id": lines["product_id"].tolist(),
            "action": ["bought"] * len(lines),
            "time": pa.array(lines["transaction_timestamp"]).cast(pa.timestamp("us", "UTC")),
            "basket": lines["basket_id"].tolist(),
            "paid": lines["sales_value"].tolist(),
        }
    )
    # Some products that were bought are not among the products: nothing is known of them but their ids.
    bought = products.set_index("product_id").reindex(sorted(set(lines["product_id"]))).reset_index()
    text = lambda column: bought[column].astype(object).where(bought[column].notna(), None).tolist()  # noqa: E731
    items = {"item_id": text("product_id"), "product": text("product_type")}
    items |= {name: text(column) for name, column in (("category", "product_category"), ("size", "package_size"))}
    items |= {name: text(name) for name in ("department", "brand", "manufacturer_id")}
    profile = households.set_index("household_id")[list(PROFILE)].reindex(sorted(set(lines["household_id"])))
    members: dict[str, list] = {"member_id": profile.index.tolist()}
    for column in PROFILE:
        members[column] = profile[column].astype(object).where(profile[column].notna(), None).tolist()
    return {"members": pa.table(members), "items": pa.table(items), "events": events}
