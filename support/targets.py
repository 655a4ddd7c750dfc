"""Which linear layers of a model have an adapter: they are named by the ends of their paths, as in PEFT."""

import re
from dataclasses import dataclass

from torch import nn

from support.files import UserError


@dataclass
class Target:
    """A set of linear layers: where they are, and their shape."""

    path: str  # "model.layers.{}.self_attn.q_proj"
    layers: list[int]  # the numbers of the decoder layers that have one; L of them
    n_in: int
    n_out: int

    def paths(self) -> list[str]:
        """The paths of its linear layers."""
        return [self.path.format(layer) for layer in self.layers]


LAYER_NUMBER = re.compile(r"\.(\d+)\.")  # the first number in a module's path is its layer


def split_path(path: str) -> tuple[str, int]:
    """A path without its number, and the number: ("model.layers.{}.self_attn.q_proj", 3)."""
    return LAYER_NUMBER.sub(".{}.", path, count=1), int(LAYER_NUMBER.search(path)[1])


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """{path: layer} of the linear layers in numbered layers."""
    decoder = network.get_decoder() if hasattr(network, "get_decoder") else network  # skip a vision tower
    decoder_modules = set(decoder.modules())
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and module in decoder_modules and LAYER_NUMBER.search(path):
            found[path] = module
    if not found:
        raise UserError("this model has no nn.Linear layers (GPT-2 has Conv1D), so it cannot have an adapter")
    return found


def find_targets(base: nn.Module, target_modules: list[str]) -> dict[str, Target]:
    """The targets of these names: ends of the paths of linear layers, as in PEFT.

    A name may have {} in place of the layer's number, as in `single_blocks.{}.to_q`. Raises UserError if it
    fits no layer, or layers in several places or of several shapes, or of another class, as quantised ones.
    """
    layers, targets = linear_layers(base), {}
    for name in target_modules:
        chosen = {}
        for path, layer in layers.items():
            if f".{path}".endswith(f".{name}") or f".{split_path(path)[0]}".endswith(f".{name}"):
                chosen[path] = layer
        if not chosen:
            last_parts = sorted({path.split(".")[-1] for path in layers})
            raise UserError(f"this model has no linear layers named {name}, but {', '.join(last_parts)}")
        for layer in chosen.values():
            if type(layer).forward is not nn.Linear.forward:
                kind = type(layer).__name__
                raise UserError(f"{name} is {kind}: quantised layers and the like have no adapters")
        targets[name] = one_target(name, {path: layer.weight.shape for path, layer in chosen.items()})
    return targets


def one_target(name: str, shapes: dict[str, tuple[int, int]]) -> Target:
    """The target that consists of the layers {path: (out, in)}. Raises UserError if they are several."""
    places, sizes = {}, {}
    for path, (n_out, n_in) in shapes.items():
        place, layer = split_path(path)
        places.setdefault(place, []).append(layer)
        sizes.setdefault((n_in, n_out), []).append(path)
    if len(places) > 1:
        ends = {place.split("{}.")[-1] for place in places}
        names = ends if len(ends) == len(places) else places
        raise UserError(f"{name} is in several places; name one of them: {', '.join(sorted(names))}")
    if len(sizes) > 1:
        example = next(iter(shapes)).split(".", 1)[-1]
        raise UserError(f"{name} has {len(sizes)} shapes; name single layers, such as {example}")
    (path, layers), (n_in, n_out) = next(iter(places.items())), next(iter(sizes))
    return Target(path, layers, n_in, n_out)


def all_targets(network: nn.Module) -> dict[str, Target]:
    """All linear layers in numbered layers, each place a target of its own."""
    shapes = {}  # {place: {path: (out, in)}}
    for path, layer in linear_layers(network).items():
        shapes.setdefault(split_path(path)[0], {})[path] = layer.weight.shape
    return {place: one_target(place, of_place) for place, of_place in shapes.items()}


def as_targets(targets: dict) -> dict[str, Target]:
    """Targets from a JSON file."""
    return {name: Target(**entry) if isinstance(entry, dict) else entry for name, entry in targets.items()}
