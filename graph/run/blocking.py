"""Run a graph from code that does not await, such as scripts and notebooks.

The calls are those of `Run`, but they block. trio runs in a separate thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import trio

from ranvier.actors.component.session import Sampling
from ranvier.actors.supervise.zygote_process import ZygoteProcess
from ranvier.transport.format.errors import LinkClosed, RanvierError

from ..check.checked import Graph
from ..inside.collection import Collected
from ..inside.features import Features, Found
from ..inside.lens import Lens
from ..inside.ops import Op, Wish
from ..observe.blame import Answer
from ..plan.plan import Plan
from ..sessions.generation import Generation, Result, Token
from ..sessions.text_codec import TextCodec
from . import run_folder
from .launch import Progress, launch
from .looking import Prompt, RunFeatures
from .recovery import Recovered
from .run import Run

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class _Thread:
    """Run a graph under trio in a separate thread, and pass calls to that thread."""

    def __init__(self, graph: Graph, options: Mapping[str, Any]) -> None:
        self.error: BaseException | None = None
        self.run: Run | None = None
        self._started = threading.Event()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event
        self._thread = threading.Thread(target=self._main, args=(graph, options), name="ranvier-run", daemon=True)
        self._thread.start()
        try:
            self._started.wait()
        except BaseException:  # Ctrl-C while the run starts
            self.end()
            raise
        if self.error is not None:
            self._thread.join()
            raise self.error

    def _main(self, graph: Graph, options: Mapping[str, Any]) -> None:
        async def main() -> None:
            self._stop = trio.Event()
            self._token = trio.lowlevel.current_trio_token()
            with self._scope:
                async with launch(graph, **options) as self.run:
                    self._started.set()
                    await self._stop.wait()

        try:
            trio.run(main)
        except BaseException as error:
            self.error = error
        self._started.set()

    def wait(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await `call` in the run's thread, and return its result.

        Raises:
            RanvierError: the run is over, or ends meanwhile.
        """
        scope = trio.CancelScope()

        async def cancellable() -> T:
            with scope:
                return await call()
            raise LinkClosed("the call was interrupted")

        try:
            return trio.from_thread.run(cancellable, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise self._over() from None
        except KeyboardInterrupt:  # a call that continued could take the result of a later call
            self.soon(scope.cancel)
            raise

    def read(self, call: Callable[[], T]) -> T:
        """Return what `call` returns in the run's thread.

        Raises:
            RanvierError: the run is over.
        """
        try:
            return trio.from_thread.run_sync(call, trio_token=self._token)
        except trio.RunFinishedError:
            raise self._over() from None

    def soon(self, call: Callable[[], None]) -> None:
        """Schedule `call` in the run's thread, unless the run is over."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(call)

    def _over(self) -> RanvierError:
        return self.error if isinstance(self.error, RanvierError) else LinkClosed("the run is over")

    def end(self) -> None:
        """End the run and its thread. Calling this twice does no harm."""
        if self._thread.is_alive():
            self.soon(self._stop.set if self.run is not None else self._scope.cancel)
            self._thread.join()


class BlockingGeneration:
    """Iterate over the tokens of one request. `result` grows with them and is complete at the end.

    `BlockingRun.generate` makes it. A generation that is not read to its end is cancelled by `close`, or when it is
    garbage-collected.
    """

    def __init__(self, thread: _Thread, generation: Generation) -> None:
        self._thread = thread
        self._generation = generation

    @property
    def result(self) -> Result:
        """Return the result so far."""
        return self._generation.result

    @property
    def reads(self) -> Mapping[str, torch.Tensor]:
        """Return what the request has read inside the model so far, as `Generation.reads` does."""
        return self._thread.read(lambda: self._generation.reads)

    @property
    def session(self) -> int:
        """Return the number of the request's session, as traces have it; 0 if it has not begun."""
        return self._generation.session

    @property
    def request_id(self) -> str:
        """Return the request's name in the run's journal; empty if there is no journal."""
        return self._generation.request_id

    def __iter__(self) -> BlockingGeneration:
        return self

    def __next__(self) -> Token:
        async def following() -> Token | None:
            return await anext(self._generation, None)

        try:
            token = self._thread.wait(following)
        except KeyboardInterrupt:
            self.close()
            raise
        if token is None:
            raise StopIteration
        return token

    def close(self) -> None:
        """End the session now, or prevent its start. Calling this twice does no harm."""
        self._thread.soon(self._generation.close)

    def __del__(self) -> None:
        self.close()  # runs in the run's thread, the only one that may send


class BlockingFeatures:
    """Find features in the prompts of a run. `BlockingRun.features` makes it."""

    def __init__(self, thread: _Thread, features: RunFeatures) -> None:
        self._thread = thread
        self._features = features

    @property
    def features(self) -> Features:
        """Return the autoencoder, with the directions of its features."""
        return self._features.features

    def of(self, prompt: Prompt, **options: Any) -> Found:
        """Return the strongest features of each position of a prompt. `options` are those of `Run.read`."""
        return self._thread.wait(lambda: self._features.of(prompt, **options))


class BlockingRun:
    """Offer a run to code that does not await. Several threads may use it at once.

    `start` makes it. Use it in a `with`. After its end, every call raises a `RanvierError`.
    """

    def __init__(self, graph: Graph, **options: Any) -> None:
        self._thread = _Thread(graph, options)
        run = self._thread.run
        assert run is not None
        self._run = run

    # -- requests -----------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[dict[str, str]] | Sequence[int], *, max_tokens: int = 128, raw: bool = False,
        sampling: Sampling | Literal["model"] | None = None, stop: Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None, logits: bool = False, logprobs: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None, template_arguments: Mapping[str, Any] | None = None,
        deadline_s: float | None = None, traceparent: str | None = None, answered: Sequence[int] = (),
        grammar: Mapping[str, Any] | None = None, edits: Sequence[Op] = (), reads: Sequence[str | Wish] = (),
    ) -> BlockingGeneration:  # fmt: skip
        """Generate tokens: `for token in run.generate(…)` gets each token as soon as it exists.

        `Run.generate` describes the arguments and the errors.
        """

        def begin() -> Generation:
            return self._run.generate(
                prompt, max_tokens=max_tokens, raw=raw, sampling=sampling, stop=stop, stop_tokens=stop_tokens,
                logits=logits, logprobs=logprobs, tools=tools, documents=documents, template=template,
                template_arguments=template_arguments, deadline_s=deadline_s, traceparent=traceparent, answered=answered,
                grammar=grammar, edits=edits, reads=reads,
            )  # fmt: skip

        return BlockingGeneration(self._thread, self._thread.read(begin))

    def read(self, prompt: Prompt, *, reads: Sequence[str | Wish], **options: Any) -> Mapping[str, torch.Tensor]:
        """Run a prompt through the model once, and return what is inside, as `Run.read` does."""
        return self._thread.wait(lambda: self._run.read(prompt, reads=reads, **options))

    def lens(self, prompt: Prompt, *, top: int = 5, **options: Any) -> Lens:
        """Return the likeliest tokens that the hidden states between all layers would give, as `Run.lens` does."""
        return self._thread.wait(lambda: self._run.lens(prompt, top=top, **options))

    def features(self, place: str, file: str | Path, top: int = 32, *, centred: bool = True) -> BlockingFeatures:
        """Return the features of a sparse autoencoder, as `Run.features` does."""
        return BlockingFeatures(self._thread, self._run.features(place, file, top, centred=centred))

    def collect(
        self, prompts: Iterable[Prompt], reads: Sequence[str], folder: str | Path, **options: Any
    ) -> Collected:  # fmt: skip
        """Write what is inside the model for many prompts into safetensors files, as `Run.collect` does."""
        return self._thread.wait(lambda: self._run.collect(prompts, reads, folder, **options))

    def patch(self, *ops: Op) -> AbstractContextManager[None]:
        """Make changes inside the model for all requests that are opened in a `with run.patch(…)`."""
        return self._run.patch(*ops)  # the calls of this thread run with its context

    def tokens(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of a prompt, as `Run.tokens` does, with its options."""
        return self._run.tokens(prompt, **options)

    def resume(self, request_id: str, after: int | None = None) -> BlockingGeneration:
        """Resume a request, as `Run.resume` does."""
        return BlockingGeneration(self._thread, self._thread.read(lambda: self._run.resume(request_id, after)))

    def call(self, traceparent: str | None = None, /, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Call the graph, as `Run.call` does."""
        return self._thread.wait(lambda: self._run.call(traceparent, **inputs))

    def score(
        self, ids: Sequence[int], *, traceparent: str | None = None, edits: Sequence[Op] = ()
    ) -> list[float]:  # fmt: skip
        """Return the log-probabilities of tokens, as `Run.score` does."""
        return self._thread.wait(lambda: self._run.score(ids, traceparent=traceparent, edits=edits))

    def scale(self, actor: str, replicas: int) -> str:
        """Scale an actor, as `Run.scale` does."""
        return self._thread.wait(lambda: self._run.scale(actor, replicas))

    def cut(self, source: str, target: str, seconds: float) -> int:
        """Cut the tcp links between two actors for some time, as `Run.cut` does."""
        return self._thread.read(lambda: self._run.cut(source, target, seconds))

    def why(self) -> Answer:
        """Return who waits for whom, and who is to blame, as `Run.why` does."""
        return self._thread.wait(self._run.why)

    def status(self) -> dict[str, Any]:
        """Return hosts, open sessions and counters, as `Run.status` does."""
        return self._thread.read(self._run.status)

    # -- properties, which also work after the end ---------------------------------------------------------------

    @property
    def run(self) -> Run:
        """Return the run itself. It lives in another thread, so read its data only, and call nothing of it."""
        return self._run

    @property
    def dir(self) -> Path:
        """Return the run folder."""
        return self._run.dir

    @property
    def plan(self) -> Plan:
        """Return the plan: what runs where."""
        return self._run.plan

    @property
    def pids(self) -> Mapping[str, int]:
        """Return the process ids of the hosts on this machine, by identity (`actor.replica.epoch`)."""
        return self._copied(lambda: dict(self._run.pids))

    @property
    def alarms(self) -> Sequence[Mapping[str, Any]]:
        """Return the edges whose tap has seen NaN or infinity, as `Run.alarms` does."""
        return self._copied(lambda: list(self._run.alarms))

    @property
    def counters(self) -> dict[str, dict[str, int]]:
        """Return what each process has counted, as `Run.counters` does."""
        return self._copied(lambda: self._run.counters)

    @property
    def recoveries(self) -> Sequence[Recovered]:
        """Return the hosts that were lost and replaced so far."""
        return self._copied(lambda: list(self._run.recoveries))

    @property
    def resumed(self) -> Sequence[str]:
        """Return the ids of the resumed run's requests, as `Run.resumed` does."""
        return self._run.resumed

    @property
    def codec(self) -> TextCodec:
        """Return the model's tokenizer, as `Run.codec` does."""
        return self._run.codec

    @property
    def metrics(self) -> str | None:
        """Return the address at which Prometheus can read this run's /metrics, if any."""
        return self._run.metrics

    def _copied(self, copy: Callable[[], T]) -> T:
        """Copy data in the run's thread, which may be changing it. After the run's end, copy it here."""
        try:
            return self._thread.read(copy)
        except RanvierError:
            return copy()

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the run and its thread. Calling this twice does no harm."""
        self._thread.end()

    def __enter__(self) -> BlockingRun:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and self._thread.error is not None:
            raise self._thread.error


def start(
    graph: Graph,
    *,
    runs: Path | str = run_folder.DEFAULT_ROOT,
    progress: Progress = lambda _what, _share: None,
    zygote: ZygoteProcess | None = None,
    chaos: Path | None = None,
    cuttable: bool = False,
    log: str | None = None,
    resume: Path | None = None,
) -> BlockingRun:
    """Start a graph and wait until it is ready.

    `launch` describes the arguments and the errors. `progress` is called in the run's own thread.
    """
    return BlockingRun(
        graph, runs=runs, progress=progress, zygote=zygote, chaos=chaos, cuttable=cuttable, log=log, resume=resume
    )
