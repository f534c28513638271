"""`LiveCatalogues`: the catalogues of a server, kept up with the changes that callers make."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from google.protobuf.message import DecodeError

from brewjax.bundle.bundle import Bundle
from brewjax.config import ConfigError
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.batching import Batcher
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.changes import ChangedRows, read_rows
from brewjax.serve.store import START, ChangeStore, StoreError
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
BATCH = 1_000  # changes that are appended at once


class LiveCatalogues:
    """The catalogues of a server, by surface, with the changes in a store.

    A change is acknowledged when the store has it. A thread reads the store, those changes and those of other servers,
    and makes of each catalogue another with their rows: what a request reads is a whole, by the code of training.

    Args:
      bundle: the served model.
      catalogues: as their tables are, by surface. What the store holds is in them when this is made.
      store: of the changes; None where there are none.
      refresh_seconds: between two refreshes at least. It is also at least the seconds that a refresh takes, so that
        refreshes take half of a core at most.
      metrics: of the server.

    Raises:
      StoreError: the store cannot be read.
      ConfigError: there is a store, and the events of a catalogue have no times.
    """

    def __init__(
        self,
        bundle: Bundle,
        catalogues: Mapping[str, Catalogue],
        store: ChangeStore | None = None,
        refresh_seconds: float = 1.0,
        metrics: Metrics | None = None,
    ):
        self._bundle, self._current, self._store = bundle, dict(catalogues), store
        self._refresh_seconds, self._metrics = refresh_seconds, metrics or Metrics()
        self._reading, self._position = threading.Lock(), START
        self._read: dict[str, list[ChangedRows]] = {surface: [] for surface in catalogues}  # not served yet
        self._new_ids = {(surface, table): set[str]() for surface in catalogues for table in ("members", "items")}
        self._arrival_times: list[float] = []  # of changes that were appended here and that no request can read yet
        self._append = Batcher(self._append_all, BATCH)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catalogue", daemon=True)
        for surface, catalogue in catalogues.items():
            if store and not catalogue.dataset.card.events.time:
                raise ConfigError(f"changes: the events of surface '{surface}' have no times, which others would need")
        self.refresh()
        for surface, catalogue in catalogues.items():
            if self._current[surface] is catalogue:
                self._serve(surface, catalogue)

    def get(self, surface: str) -> Catalogue | None:
        """The catalogue of a surface as it is now; None where the surface has none."""
        return self._current.get(surface)

    def start(self) -> None:
        """Begins to follow the store."""
        self._count_rows()
        if self._store and self._current:
            self._thread.start()

    def stop(self) -> None:
        """Ends following the store, which stays open."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    async def append(self, change: pb.Change) -> None:
        """Appends a change to the store. When this returns, the store has it, and the next refresh reads it.

        Raises:
          ValueError: names the field that does not fit the catalogue.
          StoreError: the store may not have it; to send it again does no harm.
        """
        arrival_time = time.monotonic()
        await asyncio.to_thread(self._check, change)
        await self._append([change.SerializeToString()])
        self._arrival_times.append(arrival_time)

    def refresh(self) -> None:
        """Makes the catalogues anew with what the store has beside them, where there is anything.

        Raises:
          StoreError: the store cannot be read.
        """
        if self._store is None:
            return
        start_time, num_arrived = time.monotonic(), len(self._arrival_times)
        self._read_store()
        rows_read = {surface: rows[:] for surface, rows in self._read.items() if rows}
        for surface, rows in rows_read.items():
            self._serve(surface, self._current[surface].extended(rows))
            del self._read[surface][: len(rows)]
        now = time.monotonic()
        for arrival_time in self._arrival_times[:num_arrived]:
            self._metrics.catalogue_lag.observe(now - arrival_time)
        del self._arrival_times[:num_arrived]
        if rows_read:
            self._metrics.catalogue_refresh.observe(now - start_time)
        if self._thread.is_alive():
            self._count_rows()

    def _serve(self, surface: str, catalogue: Catalogue) -> None:
        """Makes a catalogue ready, and serves it from the next request on."""
        catalogue.warm_up(self._bundle, self._bundle.surface(surface))
        self._current[surface] = catalogue

    def _count_rows(self) -> None:
        for surface, catalogue in self._current.items():
            for table in ("members", "items", "events"):
                rows = len(getattr(catalogue.dataset, table))
                self._metrics.catalogue_rows.labels(surface, table).set(rows)

    def _run(self) -> None:
        seconds = self._refresh_seconds
        while not self._stopping.wait(seconds):
            start_time = time.monotonic()
            try:
                self.refresh()
            except StoreError as error:
                self._metrics.catalogue_failures.labels("store").inc()
                log.error("the catalogue is not refreshed: %s", error)
            except Exception:  # of any record; the catalogues stay as they are, and the next try is soon
                self._metrics.catalogue_failures.labels("refresh").inc()
                log.exception("the catalogue is not refreshed")
            seconds = max(self._refresh_seconds, time.monotonic() - start_time)

    # --- reading changes

    def _check(self, change: pb.Change) -> None:
        """Raises ValueError for a change that does not fit its catalogue; else names its surface in full."""
        try:
            change.surface = self._bundle.surface(change.surface).name
        except ValueError as error:
            raise ValueError(f"surface: {error}") from None
        if self._store is None or change.surface not in self._current:
            raise ValueError("this server takes no changes of this surface (set `catalogue` and `changes`)")
        try:
            self._read_rows(change)
        except ValueError:
            self._read_store()  # another server may have added what it names
            self._read_rows(change)

    def _read_store(self) -> None:
        """Reads what is new in the store into `_read`. A change that does not fit any more is left out, and logged."""
        assert self._store
        with self._reading:
            while True:
                data, position = self._store.read(self._position)
                if not data:
                    return
                for changes in self._parse(data).values():
                    together = pb.Change()
                    for change in changes:
                        together.MergeFrom(change)
                    try:
                        self._add(together)
                    except ValueError:  # one of them
                        for change in changes:
                            try:
                                self._add(change)
                            except ValueError as error:  # card or tables are others than when it was acknowledged
                                self._leave_out(error)
                self._position = position

    def _parse(self, data: Sequence[bytes]) -> dict[str, list[pb.Change]]:
        """Changes by surface; those of surfaces without a catalogue here are for other servers."""
        changes: dict[str, list[pb.Change]] = defaultdict(list)
        for serialised in data:
            try:
                change = pb.Change.FromString(serialised)
            except DecodeError as error:
                self._leave_out(error)
                continue
            if change.surface in self._current:
                changes[change.surface].append(change)
        return changes

    def _add(self, change: pb.Change) -> None:
        self._read[change.surface].append(self._read_rows(change))
        for table in ("members", "items"):
            self._new_ids[change.surface, table].update(row.id for row in getattr(change, table))

    def _leave_out(self, error: Exception) -> None:
        self._metrics.catalogue_failures.labels("change").inc()
        log.error("a change in the store is left out: %s", error)

    def _read_rows(self, change: pb.Change) -> ChangedRows:
        catalogue = self._current[change.surface]
        members, items = (self._new_ids[change.surface, table] for table in ("members", "items"))
        return read_rows(
            change,
            catalogue.dataset,
            lambda id_: id_ in catalogue.member_rows or id_ in members,
            lambda id_: id_ in catalogue.item_rows or id_ in items,
        )

    def _append_all(self, changes: Sequence[bytes]) -> Sequence[None]:
        assert self._store
        self._store.append(changes)
        return [None] * len(changes)
