"""Moves a collection to another learner while the bank serves.

The catalog keeps a second gradient of each version, past ones too: that of the next learner. A worker encodes those
that lack, in order of sequence. So it also follows the writes, which know nothing of it. Each gradient is kept, so a
bank that was killed goes on where it was.

Meanwhile queries name the learner that they want. A query of the next learner gets the same hits with that learner's
gradients. Those that lack are encoded first, and the query waits. So it sees every acknowledged change, too.

The end is one transaction. It makes the next gradients the collection's own, or it drops them. Sequences and versions
stay in both cases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from bank_service.catalog.entries import NextLearner
from bank_service.errors import InvalidArgumentError, UnavailableError
from bank_service.records.discarder import Discarder
from bank_service.records.encode_queue import EncodeQueue
from bank_service.records.next_gradients import NextGradients
from bank_service.records.stores import Pools, Stores
from bank_service.records.writer import Writer
from bank_service.runtime.background import Background, cancelled
from bank_service.runtime.threads import in_thread
from bank_service.values.config import BankConfig
from bank_service.values.encoder import Encoder

logger = logging.getLogger(__name__)

PAGE = 4  # versions encoded at a time; a query that needs another one waits for them
MAX_LEFT = 16  # versions that the end itself may encode, while writes wait
_LOOK_SECONDS = 0.2  # between two looks for versions without a gradient
_REPORT_SECONDS = 0.5  # between two reports of progress
_RETRY_SECONDS = 1.0  # after an error


def check_folder(config: BankConfig, folder: Path) -> None:
    """InvalidArgumentError where the bank may not read a learner there for a caller. It reads nothing itself."""
    if not folder.is_absolute() or ".." in folder.parts:
        raise InvalidArgumentError(
            f"learner must be an absolute folder of the bank's machine, without .., got {str(folder)[:200]!r}",
            field="learner",
        )
    root = config.learner_root
    if not (config.is_loopback if root is None else folder.is_relative_to(root)):
        raise InvalidArgumentError(
            f"learner must lie below the bank's --learner-root, {root or 'which it was started without'}, "
            f"got {str(folder)[:200]!r}",
            field="learner",
        )


@dataclass(frozen=True, slots=True)
class UpgradeProgress:
    """The state of an upgrade."""

    learner: str  # fingerprint of the collection's learner
    next_learner: str = ""  # fingerprint; empty: there is no upgrade
    num_versions: int = 0  # of documents, past ones included
    num_done: int = 0  # of these, have a gradient of the next learner
    problem: str = ""  # the reason why the work can't go on, or why a version has no gradient

    @property
    def is_level(self) -> bool:
        """Every version has its gradient."""
        return bool(self.next_learner) and self.num_done == self.num_versions


class LearnerUpgrade:
    """Begins, finishes or takes back the upgrade of one collection. Used in the bank's event loop."""

    def __init__(
        self,
        config: BankConfig,
        stores: Stores,
        writer: Writer,
        discarder: Discarder,
        background: Background,
        pools: Pools,
        encoder: Encoder,
        make_queue: Callable[[Encoder], EncodeQueue],
    ) -> None:
        """``encoder``: of the collection's learner. ``make_queue``: starts a queue with another one."""
        self._config = config
        self._catalog = stores.catalog
        self._writer = writer
        self.gradients = NextGradients(stores, writer, discarder, background, pools, make_queue)
        self._discarder = discarder
        self._background = background
        self._pool = pools.reads
        self._encoder = encoder
        self._task: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()  # one learner at a time; a folder that hangs holds up no other action
        self._begins: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()  # one action at a time

    async def resume(self) -> None:
        """Goes on with the upgrade that an earlier process left."""
        known = await in_thread(self._pool, self._known)
        if known is not None:
            self._start(known, None)

    async def stop(self) -> None:
        """Stops the work. It goes on when the bank opens again."""
        for task in list(self._begins):
            await cancelled(task)
        async with self._changing:  # an action under way ends first
            await self._stop()

    async def begin(self, folder: str) -> AsyncGenerator[UpgradeProgress, None]:
        """Begins an upgrade to the learner in ``folder``, or joins that upgrade. Reports until it is level or stuck.

        The work goes on if the caller stops listening. InvalidArgumentError for a learner that can't be used.
        UnavailableError while there is another upgrade or a recoding.
        """
        check_folder(self._config, Path(folder))
        task = self._background.run(self._begin(Path(folder)))
        self._begins.add(task)
        task.add_done_callback(self._begins.discard)
        await asyncio.shield(task)
        while True:
            progress = await self.progress()
            yield progress
            if progress.problem or not progress.next_learner or progress.is_level:
                return
            await asyncio.sleep(_REPORT_SECONDS)

    async def progress(self) -> UpgradeProgress:
        """The state now."""
        own, following = self._writer.spec.fingerprint, self.gradients.learner
        if following is None:
            return UpgradeProgress(own)
        num_versions, num_done, lacking = await in_thread(self._pool, self._look)
        failed = self.gradients.failed
        problem = self.gradients.problem or next((failed[one] for one in lacking if one in failed), "")
        return UpgradeProgress(own, following.fingerprint, num_versions, num_done, problem)

    async def finish(self) -> UpgradeProgress:
        """Makes the next learner the collection's own. UnavailableError if more than a few gradients lack."""
        return await self._whole(self._finish())

    async def _finish(self) -> UpgradeProgress:
        async with self._changing:
            state = await self.progress()
            following, encoder = self._must_be_under_way(), self.gradients.encoder
            num_lacking = state.num_versions - state.num_done
            if encoder is None or state.problem or num_lacking > MAX_LEFT:
                raise UnavailableError(
                    f"every version must have a gradient of learner {following.fingerprint}, {num_lacking:,} of "
                    f"{state.num_versions:,} lack it: {state.problem or 'try again when the upgrade is level'}"
                )
            if not await self._writer.change_learner(encoder, self._commit):
                raise UnavailableError(
                    "every version must have a gradient of the next learner, some lack it; try again"
                )
            self._encoder = encoder
            await self._end()
            logger.info("the collection has the learner %s now", following.fingerprint)
            return await self.progress()

    async def back(self) -> UpgradeProgress:
        """Drops the next learner and its gradients. The collection keeps its learner."""
        return await self._whole(self._back())

    async def _whole(self, action: Coroutine[None, None, UpgradeProgress]) -> UpgradeProgress:
        """Does an action to its end, even if the caller is cancelled. The catalog commits in either case, and writer
        and encoders must follow it."""
        return await asyncio.shield(self._background.run(action))

    async def _back(self) -> UpgradeProgress:
        async with self._changing:
            self._must_be_under_way()
            await asyncio.wrap_future(self._catalog.drop_next())
            await self._end()
            return await self.progress()

    def _must_be_under_way(self) -> NextLearner:
        if self.gradients.learner is None:
            raise UnavailableError("an upgrade must be under way, there is none; begin one with a learner's folder")
        return self.gradients.learner

    async def _begin(self, folder: Path) -> None:
        async with self._loading:
            following = self.gradients.learner
            if following is not None:
                if str(folder) == following.folder:
                    return
                raise UnavailableError(
                    f"the collection is on its way to the learner {following.fingerprint} in {following.folder}; "
                    "finish that upgrade or take it back"
                )
            try:
                encoder = await asyncio.to_thread(self._encoder.of_learner, folder)
            except (ValueError, OSError) as error:
                raise InvalidArgumentError(
                    f"learner must be a learner of the bank's base model: {error}", field="learner"
                ) from error
            if encoder.spec.fingerprint == self._writer.spec.fingerprint:
                raise InvalidArgumentError(
                    "learner must be another than the collection's, got the same", field="learner"
                )
            following = NextLearner(encoder.spec.fingerprint, encoder.spec.layout_id, str(folder))
            async with self._changing:
                await asyncio.wrap_future(self._catalog.begin_next(following))
                self._start(following, encoder)

    def _start(self, following: NextLearner, encoder: Encoder | None) -> None:
        self.gradients.learner = following
        self._task = asyncio.create_task(self._run(following, encoder), name="bank-learner-upgrade")

    async def _commit(self) -> bool:
        """The last step, while no document is written."""
        await self.gradients.encode(await in_thread(self._pool, self._lacking, 0, MAX_LEFT))
        return await asyncio.wrap_future(self._catalog.finish_next())

    async def _stop(self) -> None:
        await cancelled(self._task)
        self._task = None
        await self.gradients.close()

    async def _end(self) -> None:
        await self._stop()
        self._background.run(self._discarder.sweep())  # the gradients of one of the learners belong to no version now

    async def _run(self, following: NextLearner, encoder: Encoder | None) -> None:
        try:
            if encoder is None:
                encoder = await asyncio.to_thread(self._encoder.of_learner, Path(following.folder))
            if encoder.spec.fingerprint != following.fingerprint:
                raise ValueError(f"the folder has {encoder.spec.fingerprint} now")
        except Exception as error:  # noqa: BLE001 - any error of the encoder, such as too little memory
            problem = (
                f"the learner {following.fingerprint} must be loaded from {following.folder}, got: {error}; mend that "
                "and start the bank again, or take the upgrade back"
            )
            self.gradients.fail(problem)
            logger.error("%s", problem)
            return
        self.gradients.open(encoder)
        after, must_retry = 0, False
        while True:
            try:
                lacking = await in_thread(self._pool, self._lacking, after)
                if lacking:
                    after = lacking[-1]
                    await self.gradients.encode([one for one in lacking if one not in self.gradients.failed])
                    continue
                pause = _LOOK_SECONDS
                if must_retry:
                    after, must_retry = 0, False
            except Exception as error:  # noqa: BLE001 - the work must go on after any error, such as one of the disk
                logger.warning("versions lack their gradient of the next learner: %s; trying again", error)
                must_retry, pause = True, _RETRY_SECONDS
            await asyncio.sleep(pause)

    def _known(self) -> NextLearner | None:
        with self._catalog.view() as view:
            return view.next_learner()

    def _lacking(self, after: int, limit: int = PAGE) -> list[int]:
        with self._catalog.view() as view:
            return view.lacking_next(after, limit)

    def _look(self) -> tuple[int, int, list[int]]:
        with self._catalog.view() as view:
            lacking = view.lacking_next(0, MAX_LEFT) if self.gradients.failed else []  # it reads all versions
            return *view.num_next(), lacking
