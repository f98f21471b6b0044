"""A module as a function of parameters that are not its own.

`torch.func.functional_call` alone would spoil a module that uses a submodule twice, as ``nn.Sequential(layer, nn.Tanh(), layer)`` does:
where it ties weights itself, it swaps the tensor of that layer twice, under both names, and what it puts back at the end is the
tensor of the call (PyTorch 2.13). So the places of each tensor are looked up here, each once, and it is told not to tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.func import functional_call

Outputs = Callable[[dict[str, Tensor], Tensor], Tensor]


def outputs_of(module: nn.Module) -> Outputs:
    """``(phi, x) -> module(x)`` with the tensors of phi in the place of the parameters (or buffers) of those names.

    What phi does not name is the module's own. A tensor that is in several places of the module has one name, the one of
    ``named_parameters``.

    Raises:
        ValueError: (the function) phi names what is frozen, or not in the module.
    """
    places, frozen = _places(module), {name for name, p in module.named_parameters() if not p.requires_grad}
    known = places.keys() - frozen

    def outputs(phi: dict[str, Tensor], x: Tensor) -> Tensor:
        if not phi.keys() <= known:
            raise ValueError(_explain(set(phi), known, frozen))
        tensors = {place: leaf for name, leaf in phi.items() for place in places[name]}
        return functional_call(module, tensors, (x,), tie_weights=False)

    return outputs


def adapted_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are adapted, by name: all but those with ``requires_grad=False``."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _places(module: nn.Module) -> dict[str, list[str]]:
    """Where each parameter and buffer is, by its first name."""
    places: dict[int, list[str]] = {}
    for name, tensor in _tensors(module):
        places.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in places.values()}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every attribute of every submodule that holds one, by a name of its own; a submodule that is used twice comes once."""
    for prefix, part in module.named_modules():
        yield from part.named_parameters(prefix, recurse=False, remove_duplicate=False)
    for prefix, part in module.named_modules():
        yield from part.named_buffers(prefix, recurse=False, remove_duplicate=False)


def _explain(given: set[str], known: set[str], frozen: set[str]) -> str:
    if given & frozen:
        return (
            f"expected no entry for a frozen parameter, got {sorted(given & frozen)}; leave them out, as initial_theta does, or call "
            ".requires_grad_() on them before the problem is made"
        )
    return (
        f"expected names of parameters, {sorted(known)}, got {sorted(given - known)} too; a tensor that is in several places "
        "has the name of dict(module.named_parameters())"
    )
