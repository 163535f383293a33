"""A pytest plugin: tests of memory on a virtual GPU, without a card.

    @pytest.mark.memory(gpu="RTX 3060 12GB", peak="10.5 GiB")
    def test_step():
        train_step(Model().cuda())

The body runs in a fork of a server process, so this process's torch stays as it is. `pytest --memory-update` writes
`memory.lock.toml`; later runs fail where a test needs more than it says. `pytest -p no:tightfit` leaves out everything
here.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from tightfit.errors import TightfitError
from tightfit.wording import say

if TYPE_CHECKING:
    from tightfit.questions.baseline import Entry
    from tightfit.simulation.client import Simulator
    from tightfit.simulation.details import Detail
    from tightfit.vgpu.records import Findings, Settings

_MARKER = "memory"
_WORKER_KEY = "tightfit_memory"
_SIZES = {"memory": "memory_bytes", "used": "used_bytes", "context": "context_bytes"}
_OTHERS = ("capability", "steps", "until", "timeout_s", "rank", "network")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tightfit")
    group.addoption("--memory-update", action="store_true", help=say("questions.plugin.update"))
    parser.addini("memory_lock", say("questions.plugin.lock"), default="memory.lock.toml")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_MARKER}(gpu, peak=None, used=None, ...): {say('questions.plugin.marker')}")
    config.stash[_KEY] = MemoryTests(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    tests = config.stash.get(_KEY, None)
    if tests is not None:
        tests.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Play the body of a marked test instead of calling it here."""
    marker = pyfuncitem.get_closest_marker(_MARKER)
    if marker is None or "virtual_gpu" in pyfuncitem.fixturenames:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = [pyfuncitem.funcargs[name] for name in names]
    tests = pyfuncitem.config.stash[_KEY]
    with _own_sentences():
        VirtualGPU(tests, pyfuncitem.nodeid, _arguments(marker)).play(pyfuncitem.obj, *arguments)
    return True


@pytest.fixture
def virtual_gpu(request: pytest.FixtureRequest) -> Callable[..., "VirtualGPU"]:
    """Return a virtual card by its name: `virtual_gpu("RTX 3060 12GB").play(function, ...)` gives its findings."""
    tests = request.config.stash[_KEY]
    marker = request.node.get_closest_marker(_MARKER)
    given = _arguments(marker) if marker else {}
    made: list[VirtualGPU] = []

    def make(gpu: str | None = None, **settings: Any) -> VirtualGPU:
        number = sum(each.plays for each in made)
        chosen = {**given, **({"gpu": gpu} if gpu else {}), **settings}
        made.append(VirtualGPU(tests, request.node.nodeid, chosen, number))
        return made[-1]

    return make


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the baselines, or hand them to the process that does."""
    tests = session.config.stash[_KEY]
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        import msgspec

        output[_WORKER_KEY] = msgspec.json.encode(tests.seen).decode()
    elif tests.updates and tests.seen:
        try:
            tests.write()
        except TightfitError as error:
            pytest.exit(f"tightfit: {error}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over the plays of a worker of pytest-xdist."""
    text = getattr(node, "workeroutput", {}).get(_WORKER_KEY)
    if text:
        import msgspec

        from tightfit.questions.baseline import Entry

        node.config.stash[_KEY].seen.update(msgspec.json.decode(text, type=dict[str, Entry]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash[_KEY].remarks():
        terminalreporter.write_line(line)


class MemoryTests:
    """The memory tests of one session: their service, their baselines and their peaks."""

    def __init__(self, config: pytest.Config) -> None:
        self.root = config.rootpath
        self.lock: Path = self.root / str(config.getini("memory_lock"))
        self.updates = bool(config.getoption("--memory-update"))
        self.seen: dict[str, Entry] = {}
        self._baseline: dict[str, Entry] | None = None
        self._simulator: Simulator | None = None
        self._written = False

    @property
    def baseline(self) -> "dict[str, Entry]":
        if self._baseline is None:
            from tightfit.questions.baseline import read_lock

            self._baseline = read_lock(self.lock)
        return self._baseline

    def play(self, script: str, arguments: Sequence[str], settings: "Settings", environ: Any = None) -> "Detail":
        """Play a script by the session's one service. Raises the error of a play that could not be made."""
        from tightfit.questions.asking import detail_request, details_of
        from tightfit.simulation.client import Simulator

        if self._simulator is None:
            self._simulator = Simulator(workers=1)
        request = detail_request([script, *arguments], settings, environ, remember=environ is None)
        (detail,) = details_of(self._simulator, [request])
        return detail

    def write(self) -> None:
        from tightfit.questions.baseline import write_lock

        write_lock(self.lock, {**self.baseline, **self.seen})
        self._written = True

    def remarks(self) -> Iterator[str]:
        """Yield lines for the end of the session."""
        if self._written:
            yield say("questions.plugin.written", path=self.lock, count=len(self.seen))
        elif self.seen:
            if new := [name for name in self.seen if name not in self.baseline]:
                yield say("questions.plugin.no_baseline", count=len(new), path=self.lock.name)
            known = [(name, each) for name, each in self.seen.items() if name in self.baseline]
            if less := [name for name, each in known if each.peak_bytes < self.baseline[name].peak_bytes]:
                yield say("questions.plugin.less", count=len(less), name=less[0], path=self.lock.name)

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()


class VirtualGPU:
    """A card for one test."""

    def __init__(self, tests: MemoryTests, name: str, chosen: "dict[str, Any]", plays: int = 0) -> None:
        self._tests, self._name = tests, name
        self._first, self.plays = plays, 0
        self._settings, self._peak_bytes = _settings(name, chosen)

    def play(self, function: Callable[..., object], *arguments: object) -> "Findings":
        """Call a function on the card, in a process of its own; the test fails where memory runs out or has grown."""
        from tightfit.simulation.dry_run import function_script

        _send_by_value_unless_importable(function)
        with _own_sentences(), function_script(function, arguments) as (script, environ):
            return self._judged(self._tests.play(script, [], self._settings, environ))

    def run(self, script: str, *arguments: str) -> "Findings":
        """Run a script on the card, likewise."""
        with _own_sentences():
            return self._judged(self._tests.play(script, arguments, self._settings))

    def _judged(self, detail: "Detail") -> "Findings":
        from tightfit.questions.baseline import entry_of
        from tightfit.questions.verdict import problems_of

        number = self._first + self.plays
        self.plays += 1
        name = self._name if number == 0 else f"{self._name} ({number + 1})"
        before = None if self._tests.updates else self._tests.baseline.get(name)
        problems = problems_of(detail, limit_bytes=self._peak_bytes, before=before, root=self._tests.root)
        if detail.findings.outcome == "fits":
            self._tests.seen[name] = entry_of(detail, self._tests.root)
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)
        return detail.findings


def _arguments(marker: pytest.Mark) -> dict[str, Any]:
    return {**({"gpu": marker.args[0]} if marker.args else {}), **marker.kwargs}


def _settings(name: str, chosen: dict[str, Any]) -> "tuple[Settings, int | None]":
    """Read the arguments of a marker or of the fixture. Fails the test for one that means nothing."""
    import msgspec

    from tightfit.config.sizes import parse_bytes
    from tightfit.vgpu.records import Settings

    known = ("gpu", "peak", *_SIZES, *_OTHERS)
    with _own_sentences():
        if unknown := [each for each in chosen if each not in known]:
            _fail(say("questions.plugin.unknown", name=unknown[0], known=", ".join(known)))
        if not chosen.get("gpu"):
            _fail(say("questions.plugin.no_gpu", test=name))
        sizes = {field: parse_bytes(str(chosen[each])) for each, field in _SIZES.items() if each in chosen}
        others = {each: chosen[each] for each in ("gpu", *_OTHERS) if each in chosen}
        peak_bytes = parse_bytes(str(chosen["peak"])) if "peak" in chosen else None
        try:
            return msgspec.convert({**sizes, **others}, Settings), peak_bytes
        except msgspec.ValidationError as error:
            _fail(say("questions.plugin.value", reason=error))


@contextlib.contextmanager
def _own_sentences() -> Iterator[None]:
    """Fail the test with one sentence for a mistake in its request."""
    try:
        yield
    except TightfitError as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    pytest.fail(f"tightfit: {sentence}", pytrace=False)


def _send_by_value_unless_importable(function: Callable[..., object]) -> None:
    """Send code of a test module that only pytest can import along with the call."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    if module is None or module.__name__ == "__main__":
        return
    try:
        spec = importlib.util.find_spec(module.__name__)
    except (ImportError, ValueError):
        spec = None
    # pytest's own finder serves modules that the other process could not find.
    top = PathFinder.find_spec(module.__name__.partition(".")[0])
    if spec is None or top is None:
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)


_KEY = pytest.StashKey[MemoryTests]()
