"""The Complete Journey (84.51 degrees): a grocer's households in 2017, from the R package of that name.

Three datasets are made of it: the products that households bought, the categories that they bought or left out on each
trip, and the campaigns of coupons that they received.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pyarrow as pa

from brewjax.data.public.rtables import import_pandas, read_rda
from brewjax.download import DownloadError, folder_with

FILES = ("transactions_sample", "products", "demographics")
CAMPAIGN_FILES = ("campaigns", "campaign_descriptions", "coupon_redemptions", "demographics")
PROFILE = ("age", "income", "home_ownership", "marital_status", "household_size", "kids_count")
REMEMBERED = 10  # categories of a household, the latest, of which a trip says whether it bought them
TIME = pa.timestamp("us", "UTC")


def read_completejourney(source: Path | None) -> dict[str, pa.Table]:
    """Households, the products they bought, and each line of a basket.

    Raises:
      DownloadError: there is no copy, or a file of it is missing.
      ImportError: pyreadr, which reads R's files, is not installed.
    """
    lines, products, households = _read(source, FILES)
    # A product that is scanned twice is one line of a basket, with the quantities added.
    keys = ["household_id", "product_id", "basket_id", "transaction_timestamp"]
    lines["saved"] = lines["retail_disc"] + lines["coupon_disc"] + lines["coupon_match_disc"]
    lines = lines.groupby(keys, as_index=False)[["quantity", "sales_value", "saved"]].sum()
    events = pa.table(
        {
            "member_id": lines["household_id"].tolist(),
            "item_id": lines["product_id"].tolist(),
            "action": ["bought"] * len(lines),
            "time": pa.array(lines["transaction_timestamp"]).cast(TIME),
            "basket": lines["basket_id"].tolist(),
            "paid": lines["sales_value"].tolist(),
            "saved": lines["saved"].round(2).tolist(),
        }
    )
    # Some products that were bought are not among the products: nothing is known of them but their ids.
    bought = products.set_index("product_id").reindex(sorted(set(lines["product_id"]))).reset_index()
    text = lambda column: bought[column].where(bought[column].notna(), None).tolist()  # noqa: E731
    items = {"item_id": text("product_id"), "product": text("product_type")}
    items |= {name: text(column) for name, column in (("category", "product_category"), ("size", "package_size"))}
    items |= {name: text(name) for name in ("department", "brand", "manufacturer_id")}
    return {"members": _households(households, lines["household_id"]), "items": pa.table(items), "events": events}


def read_categories(source: Path | None) -> dict[str, pa.Table]:
    """Households and the categories of products that each trip bought, or left out although one of the latest
    REMEMBERED had; column `again` says whether the household had bought of it before."""
    lines, products, households = _read(source, FILES)
    products = products[products["product_category"].notna()].set_index("product_id")
    lines = lines[lines["product_id"].isin(products.index)]
    lines = lines.assign(category=products["product_category"].reindex(lines["product_id"]).tolist())
    departments = products.groupby("product_category")["department"].agg(lambda values: values.mode().iloc[0])
    trips = lines.sort_values(["transaction_timestamp", "basket_id"]).groupby(
        ["household_id", "transaction_timestamp", "basket_id"], sort=True
    )
    latest: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
    ever: dict[str, set[str]] = defaultdict(set)
    rows: dict[str, list[Any]] = {name: [] for name in ("member_id", "item_id", "action", "time", "trip", "again")}
    for (household, time, trip), categories in trips["category"]:
        bought = sorted(set(categories))
        for action, names in (("bought", bought), ("left", sorted(set(latest[household]) - set(bought)))):
            for name in names:
                values = (household, name, action, time, trip, name in ever[household])
                for column, value in zip(rows, values, strict=True):
                    rows[column].append(value)
        for name in bought:
            if name in latest[household]:
                latest[household].remove(name)
            latest[household].append(name)
        ever[household].update(bought)
    rows["time"] = pa.array(rows["time"]).cast(TIME)
    names = sorted(set(rows["item_id"]))
    items = {
        "item_id": names,
        "category": [name.capitalize() for name in names],
        "department": departments.reindex(names).tolist(),
    }
    members = _households(households, lines["household_id"])
    return {"members": members, "items": pa.table(items), "events": pa.table(rows)}


def read_campaigns(source: Path | None) -> dict[str, pa.Table]:
    """Households and the campaigns of coupons that they received and redeemed; `visited` is none of these."""
    pandas = import_pandas()
    received, campaigns, redeemed, households = _read(source, CAMPAIGN_FILES)
    campaigns = campaigns.set_index("campaign_id")
    first = redeemed.sort_values("redemption_date").drop_duplicates(["household_id", "campaign_id"])
    starts = pandas.to_datetime(campaigns["start_date"])
    columns = {
        "member_id": received["household_id"].tolist() + first["household_id"].tolist(),
        "item_id": received["campaign_id"].tolist() + first["campaign_id"].tolist(),
        "action": ["received"] * len(received) + ["redeemed"] * len(first),
        "time": pa.array(
            starts.reindex(received["campaign_id"]).tolist() + pandas.to_datetime(first["redemption_date"]).tolist(),
            pa.timestamp("us"),
        ).cast(TIME),
    }
    ends = pandas.to_datetime(campaigns["end_date"])
    items = {
        "item_id": campaigns.index.tolist(),
        "campaign": [f"Campaign of {(end - start).days} days" for start, end in zip(starts, ends, strict=True)],
        "type": campaigns["campaign_type"].tolist(),
        "days": [(end - start).days for start, end in zip(starts, ends, strict=True)],
        "starts": [start.date() for start in starts],
    }
    members = _households(households, columns["member_id"])
    return {"members": members, "items": pa.table(items), "events": pa.table(columns)}


def read_trips(source: Path | None) -> dict[str, pa.Table]:
    """Households and the stores where they shopped. A trip within a week of the one before to the same store is also
    `returned`, a second before it `shopped`: the answer to the earlier trip, and no part of the later one."""
    lines, _, households = _read(source, FILES)
    moment = ["household_id", "store_id", "transaction_timestamp"]
    trips = lines.sort_values([*moment, "basket_id"]).drop_duplicates(moment)
    spent = lines.groupby("basket_id")["sales_value"].sum().reindex(trips["basket_id"]).round(2).tolist()
    gap = trips.groupby(["household_id", "store_id"])["transaction_timestamp"].diff()
    back = trips[gap.dt.total_seconds() <= 7 * 86_400]
    second = import_pandas().Timedelta(seconds=1)
    columns = {
        "member_id": trips["household_id"].tolist() + back["household_id"].tolist(),
        "item_id": trips["store_id"].tolist() + back["store_id"].tolist(),
        "action": ["shopped"] * len(trips) + ["returned"] * len(back),
        "time": pa.array(
            trips["transaction_timestamp"].tolist() + (back["transaction_timestamp"] - second).tolist(),
            pa.timestamp("us"),
        ).cast(TIME),
        "spent": spent + [None] * len(back),
    }
    stores = sorted(set(columns["item_id"]))
    items = {"item_id": stores, "store": [f"Store {number}" for number in stores]}
    members = _households(households, columns["member_id"])
    return {"members": members, "items": pa.table(items), "events": pa.table(columns)}


def _read(source: Path | None, names: tuple[str, ...]) -> list[Any]:
    folder = folder_with(f"{names[0]}.rda", source, "completejourney")
    if missing := [f"{name}.rda" for name in names if not (folder / f"{name}.rda").is_file()]:
        raise DownloadError(f"{folder} has no {', '.join(missing)}")
    return [read_rda(folder, name) for name in names]


def _households(households: Any, members: Any) -> pa.Table:
    """The profile of each member; all unknown for the two thirds of households of whom nothing is."""
    profile = households.set_index("household_id")[list(PROFILE)].reindex(sorted(set(members)))
    columns: dict[str, list] = {"member_id": profile.index.tolist()}
    for column in PROFILE:
        columns[column] = profile[column].where(profile[column].notna(), None).tolist()
    return pa.table(columns)
