"""What is held together by hand: names of ours that have moved, and private names of libraries that we need."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: arguments that a thing has got since, and what it did before: a run that does not name them was made so
BEFORE: dict[str, dict[str, Any]] = {"selfsight.datamodules.folder": {"split": "draw"}}


def as_it_was(node: Any) -> None:
    """Name in a run's configuration what was no argument when the run was made."""
    from omegaconf import DictConfig, open_dict

    if not isinstance(node, DictConfig):
        return
    missing = {key: value for key, value in BEFORE.get(str(node.get("_target_")), {}).items() if key not in node}
    if missing:
        with open_dict(node):
            node.update(missing)


def moved(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that finds modules where they stand now: old configurations name them as they were.

    Args:
        places: module: the subpackage it has moved to.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return importlib.import_module(f"{package}.{places[name]}.{name}")

    return find


class _Absent:
    """An import hook to which some packages are not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in self.packages:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


@contextlib.contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Optional packages of a library, as if they were not installed while it is imported; those imported before stay.

    timm imports wandb wherever that is installed, for a summary that nobody asks for here: a second of every start.
    """
    hook = _Absent(packages)
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        sys.meta_path.remove(hook)


class _Signals(Loader):
    """An import hook for SciPy's signals: a module with the one name that torchmetrics looks for, until it is used."""

    name = "scipy.signal"

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        def used(name: str) -> Any:
            if name.startswith("__") and name not in ("__all__", "__path__"):  # `inspect` looks, and uses nothing
                raise AttributeError(name)
            self.forget()
            return getattr(importlib.import_module(self.name), name)

        vars(module).update(hamming=None, __getattr__=used)

    def forget(self) -> None:
        """Whoever imports them from now on has SciPy's own."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            if sys.modules.pop(self.name, None) is not None:
                vars(sys.modules["scipy"]).pop("signal", None)


@contextlib.contextmanager
def without_signals() -> Iterator[None]:
    """Lightning is imported without SciPy's signals, 0.4 s of every start; whoever uses them has them.

    Lightning needs torchmetrics, which looks whether they have the old name ``hamming``, and takes nothing from them.
    """
    hook = _Signals()
    if hook.name not in sys.modules:
        sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        hook.forget()


def hydra_engine(job: str, folders: Sequence[tuple[str, str]]) -> Any:
    """Hydra itself, on several folders with configurations, the first of them the program's.

    ``hydra.initialize_config_dir`` takes one folder, and ``hydra.main`` keeps what became of the runs of a sweep to
    itself; both change a global state that nested jobs would share.

    Args:
        folders: (who brings it, folder).
    """
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    version.setbase("1.3")
    (_, first), *others = folders
    path = create_config_search_path(first)
    for provider, folder in reversed(others):
        path.append(provider, f"file://{folder}", anchor=SearchPathQuery(provider="main"))
    return Hydra(job, ConfigLoaderImpl(path))


def set_values(config: DictConfig, words: Sequence[str]) -> None:
    """Set keys of a configuration that Hydra has composed, as it does itself after composing, told of in ``hydra``.

    Composing anew, which reads some thirty files, would come to the same.

    Args:
        words: ``key=value``, ``+key=value``, ``++key=value`` or ``~key``, none of them a choice of a group.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(words)), config)
    config.hydra.overrides.task.extend(words)


def hydra_launcher(engine: Any, config: Any, task: Callable[[Any], Any]) -> Any:
    """The launcher that a sweep's configuration chooses, ready to start ``task``.

    Hydra makes launchers for the sweepers of its own plug-in packages alone.

    Args:
        engine: from `hydra_engine`. config: composed by it for a sweep.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    context = HydraContext(config_loader=engine.config_loader, callbacks=Callbacks(config))
    return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)


def watching_operations(look: Callable[[str, Sequence[Any], Any], None]) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``look(name, arguments, result)`` is called after every operation on tensors, also backward.

    Hooks of modules see what goes from layer to layer, and nothing of the arithmetic of a loss.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            look(func.overloadpacket.__name__, args, result)
            return result

    return Watch()
