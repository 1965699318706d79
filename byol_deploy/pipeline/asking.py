"""Any PyTorch module or function as a reference: found by its name, and called the way it takes images.

:class:`Asked` offers what the noise measurement of :mod:`byol_deploy.pipeline.reference` needs of the project's own
graph: :meth:`Asked.run`, :meth:`Asked.doubled`, a copy with another memory layout and the parameters. So a stranger's
module is measured exactly as an encoder is.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from byol_deploy.errors import UsageError
from byol_deploy.parity import first_line
from byol_deploy.preprocess import Preprocessing

if TYPE_CHECKING:
    import torch

Layout = Literal["NCHW", "NHWC"]

_SYNTAX = "give an importable module and something in it, e.g. my_package.models:build"


class RefusedError(UsageError, RuntimeError):
    """The reference raised, or gave what is no output.

    For the user this is wrong usage. Where the reference is only tried out in another arithmetic it is what PyTorch
    itself raises for that, a ``RuntimeError``.
    """


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """While somebody else's code runs: importable from the current directory, silent on stdout, random state kept."""
    import torch

    # The installed program does not look for modules where it was started; `python -m` would.
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


@dataclass(frozen=True)
class Form:
    """How images are handed over.

    Attributes:
        dtype: ``uint8`` for the pixels as they are; ``float32``, ``float16`` or ``float64`` for normalised ones.
        layout: Where the channels are.
        array: Whether they come as a tensor or as a NumPy array.
    """

    dtype: str
    layout: Layout
    array: Literal["torch", "numpy"] = "numpy"

    def of(self, pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        """pixels: (N, H, W, 3) uint8. Returns a new array in this form: whoever gets it may write to it."""
        if self.dtype == "uint8":
            return np.array(pixels.transpose(0, 3, 1, 2) if self.layout == "NCHW" else pixels, order="C")
        normal = preprocessing.normalize(pixels).astype(self.dtype)
        return np.array(normal.transpose(0, 2, 3, 1) if self.layout == "NHWC" else normal, order="C")

    def __str__(self) -> str:
        """E.g. ``float32 (N, 3, H, W), normalised``."""
        shape = "(N, 3, H, W)" if self.layout == "NCHW" else "(N, H, W, 3)"
        return f"{self.dtype} {shape}, {'pixels' if self.dtype == 'uint8' else 'normalised'}"


@dataclass(frozen=True, eq=False)
class Target:
    """What was asked for: ``call`` computes outputs from images.

    Attributes:
        call: The module itself, or a function.
        module: A module in evaluation mode on the CPU in float32, ours to change; None for a plain function.
        words: For the report.
        warnings: What was changed to make it comparable.
    """

    call: Callable[[Any], Any]
    module: torch.nn.Module | None
    words: str
    warnings: tuple[str, ...] = ()


def find_target(against: str | Callable[..., Any]) -> Target:
    """The reference that ``against`` means.

    Args:
        against: ``module:callable``, or the thing itself: a module, a class or a function without arguments that
            gives one, or a function from images to outputs. A module is copied, never changed.

    Raises:
        UsageError: It cannot be imported or built, or is none of these.
    """
    import torch

    found = _imported(against) if isinstance(against, str) else against
    words = against if isinstance(against, str) else getattr(found, "__qualname__", type(found).__name__)
    made = found
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise UsageError(
                f"{words} is of type {type(found).__name__}; {_SYNTAX}, that is or gives a torch.nn.Module"
            )
        made = _built(found, words)
    if not isinstance(made, torch.nn.Module):
        return Target(made, None, f"{words}, a function")
    return _module_target(made, words, ours=made is not found)


def _module_target(given: torch.nn.Module, words: str, *, ours: bool) -> Target:
    import torch

    module = given
    if not ours:
        try:
            module = copy.deepcopy(given)
        except Exception as error:
            raise UsageError(
                f"{words} cannot be copied ({first_line(error)}); give a function that builds it instead"
            ) from error
    tensors = [*module.parameters(), *module.buffers()]
    other = sorted({str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32})
    warnings = []
    if other:
        warnings.append(f"the reference has numbers of type {', '.join(other)}; it was computed in float32")
        module = module.float()
    # An exported program's module cannot be switched, and is what it was exported as.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    module = module.cpu().requires_grad_(False)
    return Target(module, module, f"{words} ({type(module).__name__}, evaluation mode)", tuple(warnings))


def _imported(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"against is {name!r}; {_SYNTAX}")
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        # A script without a __main__ guard may do anything when it is imported, and often leaves.
        raise UsageError(
            f"{name} cannot be imported ({type(error).__name__}: {first_line(error)}); {_SYNTAX}; the current "
            "directory and the Python path are searched"
        ) from error
    return found


def _built(found: Callable[..., Any], words: str) -> Callable[[Any], Any]:
    """What a class or a factory makes; a function from images to outputs stays itself."""
    import torch

    if not _takes(found, 0):
        if isinstance(found, type):
            raise UsageError(f"the class {words} needs arguments; give a function without any that builds the module")
        return found
    try:
        made = found()
    except Exception as error:
        raise UsageError(
            f"{words}() raised {type(error).__name__}: {first_line(error)}; it is called without arguments to build "
            "the reference"
        ) from error
    if isinstance(made, torch.nn.Module) or callable(made):
        return made  # type: ignore[no-any-return]
    if not isinstance(found, type) and _takes(found, 1):
        return found
    raise UsageError(
        f"{words}() gave something of type {type(made).__name__}; it must give a torch.nn.Module, or take images and "
        "give outputs"
    )


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # built into Python: it does not say
        return count == (0 if isinstance(function, type) else 1)
    return True


@dataclass(eq=False)
class Asked:
    """A target that is asked in one form.

    Attributes:
        target: Whom.
        form: How.
        preprocessing: The normalisation.
        names: Names of outputs that come without names, in order; further ones are called ``reference output n``.
        batch: Images per call where no other number is possible; None where it is free.
        example: (N, H, W, 3) uint8: a few images that it takes.
        left_out: Outputs that are not one row per image, with the reason.
        shapes: Shape of each output for one image.
        double: Whether it computes in float64.
    """

    target: Target
    form: Form
    preprocessing: Preprocessing
    names: Sequence[str]
    batch: int | None
    example: np.ndarray
    left_out: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    named: bool = False
    double: bool = False

    def run(self, images: np.ndarray, batch_size: int = 7) -> dict[str, np.ndarray]:
        """Compute the outputs, a few images at a time.

        Args:
            images: (N, H, W, 3) uint8, N at least 1.
            batch_size: Images per call, unless only one number is possible.

        Returns:
            Output name to (N, D).

        Raises:
            RefusedError: It raised, or gave what is no output.
        """
        n, size = len(images), self.batch or batch_size
        places = np.arange(-(-n // size) * size if self.batch else n) % n
        parts = [self._once(images[places[start : start + size]]) for start in range(0, len(places), size)]
        try:
            whole = {name: np.concatenate([part[name] for part in parts])[:n] for name in parts[0]}
        except (KeyError, ValueError) as error:
            raise RefusedError(
                f"the reference {self.target.words} gives outputs of another name or size for other images "
                f"({first_line(error)}); compare what comes before them"
            ) from error
        return whole

    def doubled(self) -> Asked:
        """A copy that computes in float64 from the same float32 parameters."""
        twin = copy.deepcopy(self)
        if twin.target.module is not None:
            twin.target.module.double()
        twin.double = True
        return twin

    def to(self, memory_format: Any) -> Asked:
        """Lay the memory out otherwise, where the module can be computed so: one that flattens with ``view`` cannot."""
        import torch

        module = self.target.module
        if module is not None:
            try:
                module.to(memory_format=memory_format)
                self.run(self.example)
            except RuntimeError:
                module.to(memory_format=torch.contiguous_format)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The module's parameters and buffers; empty for a function."""
        return {} if self.target.module is None else self.target.module.state_dict()

    def look(self) -> None:
        """Ask once, and note names, shapes, and which outputs are not one row per image.

        Raises:
            RefusedError: It raised, or gave what is no output.
        """
        images = self.example
        named, outputs = self._raw(images)
        self.named = named
        for name, values in outputs.items():
            if values.ndim == 0 or len(values) != len(images):
                self.left_out[name] = f"the reference gives shape {values.shape} for {len(images)} images"
            else:
                self.shapes[name] = values.shape[1:]

    def _once(self, images: np.ndarray) -> dict[str, np.ndarray]:
        _, outputs = self._raw(images)
        rows = {}
        for name, values in outputs.items():
            if name in self.left_out:
                continue
            if values.ndim == 0 or len(values) != len(images):
                raise RefusedError(
                    f"the reference {self.target.words} gives {name} with shape {values.shape} for {len(images)} "
                    "images; its first dimension must be the batch"
                )
            if self.double and values.dtype.kind == "f" and values.dtype != np.float64:
                raise RefusedError(f"{name} is {values.dtype} whatever comes in")
            rows[name] = values.reshape(len(values), -1)
        return rows

    def _raw(self, images: np.ndarray) -> tuple[bool, dict[str, np.ndarray]]:
        import torch

        given: Any = self.form.of(images, self.preprocessing)
        if self.double and given.dtype.kind == "f":
            given = given.astype(np.float64)
        if self.form.array == "torch":
            given = torch.from_numpy(given)
        try:
            with _in_double() if self.double else contextlib.nullcontext():
                raw = self.target.call(given)
        except Exception as error:
            raise RefusedError(
                f"the reference {self.target.words} raised {type(error).__name__} on {len(images)} images of "
                f"{images.shape[1]} x {images.shape[2]} px, {self.form}: {first_line(error)}"
            ) from error
        if isinstance(raw, Mapping):
            flat = {str(key): _flat(value) for key, value in raw.items()}
            if all(len(values) <= 1 for values in flat.values()):
                return True, {key: values[0] for key, values in flat.items() if values}
        values = _flat(raw)
        names = [*self.names, *(f"reference output {place + 1}" for place in range(len(self.names), len(values)))]
        return False, dict(zip(names, values, strict=False))


def ask(
    target: Target, forms: Sequence[Form], preprocessing: Preprocessing, names: Sequence[str], batch: int | None,
    example: np.ndarray,
) -> Asked:  # fmt: skip
    """Find the form in which a target takes images: the first one of ``forms`` that it computes something for.

    Args:
        target: Whom.
        forms: Those to try, the likeliest first. A NumPy array is handed to plain functions only.
        preprocessing: The normalisation.
        names: Names of the outputs of the file, in order.
        batch: Images per call; None leaves it free.
        example: (N, H, W, 3) uint8.

    Raises:
        UsageError: It refuses all of them; the message holds what it said to the likeliest.
    """
    said = []
    for form in forms:
        if form.array == "numpy" and target.module is not None:
            continue
        asked = Asked(target, form, preprocessing, names, batch, example)
        try:
            asked.look()
        except RefusedError as error:
            said.append(str(error))
            continue
        return asked
    raise UsageError(
        f"{said[0]} ({len(said)} forms of the images were tried); give a module or function that takes them, "
        "or another --image-size"
    )


def _flat(raw: Any) -> list[np.ndarray]:
    """Tensors and arrays in order, out of lists and tuples; what is None is left out, as an exporter does."""
    import torch

    if raw is None:
        return []
    if isinstance(raw, torch.Tensor):
        tensor = raw.detach().cpu()
        coarse = tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
        return [(tensor.float() if coarse else tensor).numpy()]
    if isinstance(raw, np.ndarray | np.generic):
        return [np.asarray(raw)]
    if isinstance(raw, Mapping):
        return [array for value in raw.values() for array in _flat(value)]
    if isinstance(raw, list | tuple):
        return [array for value in raw for array in _flat(value)]
    raise RefusedError(f"the reference gives something of type {type(raw).__name__}; it must give tensors or arrays")


def _in_double() -> contextlib.AbstractContextManager[Any]:
    """Where code says float32, float64 is meant: a module that casts its uint8 input could not be doubled else."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.float:
                return args[0].double()

            def meant(value: Any) -> Any:
                return torch.float64 if value is torch.float32 else value

            return func(*map(meant, args), **{key: meant(value) for key, value in (kwargs or {}).items()})

    return Doubling()
