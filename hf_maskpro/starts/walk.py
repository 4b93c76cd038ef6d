"""The calibration walk: decoder layer by decoder layer, each seeing what the masked layers before it produce."""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..tuner import MaskProExperts, MaskProExpertWeight, MaskProLayer, evaluating, masked_layers
from ..tuner.base import listed
from ..tuner.experts import has_kernels
from .batches import sequences_in, tokens_in, without_cache
from .blocks import Example


logger = logging.getLogger(__name__)


class Inputs:
    """
    What a layer's inputs X of shape `[tokens, in_features]` add up to, in float32.

    Attributes:
        squares (`torch.Tensor`): Sum of the squares of every feature, `[in_features]`.
        gram (`torch.Tensor` or `None`): X^T X, `[in_features, in_features]`, if asked for; in a walk by stages of
            tokens of size 1, so that a few massive ones do not rule, and drawn towards its diagonal, so that it suits
            other texts too.
        lost (`torch.Tensor` or `None`): (X_dense - X)^T X of such tokens, where X_dense is what the dense model gives
            the layer: what the masks before it have lost.
        tokens (`int`): How many tokens there were.
        sequences (`int`): How many sequences they came in.
    """

    def __init__(self, in_features: int, device: torch.device, with_gram: bool):
        self.squares = torch.zeros(in_features, device=device)
        self.gram = torch.zeros(in_features, in_features, device=device) if with_gram else None
        self.lost: torch.Tensor | None = None
        self.tokens = self.sequences = 0

    def update(self, rows: torch.Tensor, sequences: int) -> None:
        """Add inputs `[tokens, in_features]`."""
        rows = rows.float()
        self.tokens += len(rows)
        self.sequences += sequences
        if self.gram is None:
            self.squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.squares = self.gram.diagonal()

    def update_beside_dense(self, rows: torch.Tensor, dense: torch.Tensor | None, sequences: int) -> None:
        """Add inputs, and if they are known those that the dense model would have had for the same tokens."""
        self.tokens += len(rows)
        self.sequences += sequences
        exact = rows.float()
        squares = exact.square()
        self.squares += squares.sum(0)
        if self.gram is None:
            return
        scale = squares.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
        unit = exact * scale
        # The lower half is the upper one.
        step = -(-unit.shape[1] // GRAM_BLOCKS)
        for start in range(0, unit.shape[1], step):
            self.gram[start : start + step, start:].addmm_(unit[:, start : start + step].T, unit[:, start:])
        if dense is not None:
            # In half precision, which is several times as fast: it is damped, and added to what is exact.
            dtype = torch.bfloat16 if rows.dtype == torch.float16 else rows.dtype
            lost = (((dense - rows) * scale).to(dtype).T @ unit.to(dtype)).float()
            self.lost = lost if self.lost is None else self.lost.add_(lost)

    def complete(self) -> None:
        """Fill the lower half of the Gram matrix, and draw it towards its diagonal."""
        if self.gram is None:
            return
        above = self.gram.triu(1).mul_(1 - SHRINKAGE)
        self.gram = (above + above.T).diagonal_scatter(self.gram.diagonal())


# How far the Gram matrix of a walk by stages goes towards its diagonal: which features go together differs from
# text to text, and what makes up for a dropped weight on the calibration text does not elsewhere.
SHRINKAGE = 0.3

# Of the upper half of a Gram matrix, more blocks compute less of the lower one, in smaller products.
GRAM_BLOCKS = 4


@dataclass
class Calibration:
    """
    What a rule may look at beside the weight.

    Attributes:
        inputs (`Inputs`, *optional*): Of the layer.
        gradient (`torch.Tensor`, *optional*): L2 norm over the sequences of the gradient of every weight of the dense
            model, float32 `[out_features, in_features]`.
    """

    inputs: Inputs | None = None
    gradient: torch.Tensor | None = None


@dataclass
class _Batch:
    """What enters a decoder layer, the other arguments of every decoder layer, and which tokens are none."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    attention_mask: torch.Tensor | None = None
    # The same in the dense model.
    dense_hidden: torch.Tensor | None = None
    # Of the decoder layer under way, what modules whose masks are all chosen have put out, call by call.
    known: dict[nn.Module, list[Any]] = field(default_factory=dict)

    def run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.arguments[index]
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def remembering(self, finished: Collection[nn.Module] = ()) -> Iterator[None]:
        """
        Let modules whose masks are all chosen compute what they put out once, and say it again in later runs. What
        they consist of is then forgotten.
        """
        known = {module: self.known.setdefault(module, []) for module in (*self.known, *finished)}
        with _running(
            {module: partial(_remember, module.forward, outputs, count()) for module, outputs in known.items()}
        ):
            yield
        for module in finished:
            if self.known[module]:
                for inner in module.modules():
                    if inner is not module:
                        self.known.pop(inner, None)

    def example(self, block: nn.Module, index: int) -> Example:
        """What to learn from once the dense output is known; what was remembered of other masks is forgotten."""
        assert self.dense_hidden is not None
        self.known.clear()
        return lambda: self.rows(self.run(block, index, self.hidden)), self.rows(self.dense_hidden)

    def rows(self, inputs: torch.Tensor) -> torch.Tensor:
        return _rows(inputs, self.attention_mask)

    def is_row_a_token(self, inputs: torch.Tensor) -> bool:
        return inputs[..., 0].numel() == self.hidden[..., 0].numel()


def _rows(inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """A layer's inputs without padding; what is no longer one row a token, as in an expert, is left as it is."""
    rows = inputs.flatten(0, -2)
    if attention_mask is None or len(rows) != attention_mask.numel():
        return rows
    return rows[attention_mask.flatten() != 0]


def _remember(forward: Callable[..., Any], known: list[Any], calls: Iterator[int], *args: Any, **kwargs: Any) -> Any:
    """A module's forward, of which so many outputs are known."""
    call = next(calls)
    if call == len(known):
        known.append(forward(*args, **kwargs))
    return known[call]


@contextmanager
def _running(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward."""
    # Where something else has done so already, its own is put back.
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


class _StopForward(Exception):
    """Raised where nothing that would still run is wanted."""


class Choose(Protocol):
    """Sets the mask of a layer by what its inputs add up to; of experts one at a time, and returns it."""

    def __call__(self, name: str, layer: MaskProLayer, inputs: Inputs, number: int = 0) -> torch.Tensor: ...


Learn = Callable[[list[MaskProLayer], list[Example]], None]

# A masked layer, or experts of which some parameters are masked: what is called.
Unit = MaskProLayer | MaskProExperts


@dataclass
class Routed:
    """What experts are given: tokens `[tokens, in_features]`, and which experts each goes to, `[tokens, k]`."""

    tokens: torch.Tensor
    experts: torch.Tensor

    def without_padding(self, attention_mask: torch.Tensor | None) -> "Routed":
        """Those that are tokens."""
        return Routed(_rows(self.tokens, attention_mask), _rows(self.experts, attention_mask))


# An expert that saw fewer tokens keeps its largest weights: what Wanda chooses by fewer loses hardly less on others.
FEWEST_TOKENS = 16


@torch.no_grad()
def walk(
    model: nn.Module,
    adapter_name: str,
    batches: list[dict[str, Any]],
    with_gram: bool,
    choose: Choose,
    in_order: bool = False,
    learn: Learn | None = None,
) -> None:
    """
    Visit the masked layers in order: gather what their inputs add up to, then choose their masks.

    Each decoder layer runs twice: dense to gather and masked to hand its outputs on, as in the code of Wanda, RIA and
    SparseGPT, so that one layer's activations are in memory at a time. Layers that are given the same tensor, as q, k
    and v are, share [`Inputs`].

    `in_order` goes on within a decoder layer as it runs: what is given the same tensor is one stage, each sees what
    the masks before it make of the tokens, and what the dense model would have made of them. What has all its
    masks is computed once.

    A model may have several lists of such layers, as an encoder and a decoder: they are walked in the order in which
    they run. Layers outside of them, and all layers of a model without such a list, come last and in one pass over the
    whole model: what all of them gather is in memory together, for X^T X the square of their `in_features`.

    Args:
        model (`torch.nn.Module`): A model with one active mask adapter.
        adapter_name (`str`): The adapter, whose masks are chosen.
        batches (`list[dict]`): Batches for the model's forward.
        with_gram (`bool`): Gather X^T X too.
        choose ([`Choose`]): Sets the mask of a layer, given its name and its inputs.
        in_order (`bool`): Go by stages. The inputs of a decoder layer's dense linear layers, and what they put out,
            are in memory meanwhile.
        learn (`Callable`, *optional*): In a walk by stages, moves the masks of a decoder layer once all are chosen,
            given what runs it and what the dense model gave.

    Raises:
        `ValueError`: if there is no batch, or batches take different ways through the model.
    """
    names = {layer: name for name, layer in masked_layers(model, adapter_name).items()}
    if not batches:
        raise ValueError("the calibration data is empty; pass at least one batch.")
    left = dict(names)
    with evaluating(model):
        for blocks in _stacks(model, names, batches[0]):
            inside = [layer for block in blocks for layer in block.modules() if layer in left]
            captured = _capture(model, blocks, batches, list(left))
            _walk_blocks(blocks, captured, names, with_gram, choose, in_order, learn)
            left = {layer: name for layer, name in left.items() if layer not in inside}
        if left:
            _choose_at_once(model, left, batches, with_gram, choose, in_order)
        for layer in names:
            layer.forget_masked_weight()


def _walk_blocks(
    blocks: list[nn.Module],
    captured: list[_Batch],
    names: dict[MaskProLayer, str],
    with_gram: bool,
    choose: Choose,
    in_order: bool,
    learn: Learn | None,
) -> None:
    """Choose the masks of layers that run one after the other."""
    for index, block in enumerate(tqdm(blocks, desc="calibration")):
        inside = [layer for layer in block.modules() if layer in names]
        if in_order:
            _choose_in_order(block, index, inside, captured, names, with_gram, choose)
            if learn is not None and inside:
                learn(inside, [batch.example(block, index) for batch in captured])
        else:
            gathered, routed = _gather(block, index, inside, captured, with_gram)
            for layer, inputs in gathered.items():
                choose(names[layer], layer, inputs)
            for experts, calls in routed.items():
                _choose_experts(experts, calls, names, with_gram, choose)
        for batch in captured:
            # Of a walk by stages, all but the last are known.
            with batch.remembering():
                batch.hidden = batch.run(block, index, batch.hidden)
            batch.known.clear()
        for layer in inside:
            layer.forget_masked_weight()


# What every layer is given in one batch, in the order in which they run: a tensor a call, of experts [`Routed`].
_Given = dict[Any, list[Any]]


@dataclass
class _Call:
    """A call of experts: what they are given, in how many sequences, and what the dense model gives them there."""

    routed: Routed
    sequences: int
    dense: torch.Tensor | None = None


def _units(modules: Iterable[nn.Module], layers: Collection[MaskProLayer]) -> list[Unit]:
    """What is called of some modules if these layers are masked: with them experts, in the place of their weights."""
    return [
        module
        for module in modules
        if (isinstance(module, MaskProExperts) and any(layer in layers for layer in module.masked()))
        or (isinstance(module, MaskProLayer) and module in layers and not isinstance(module, MaskProExpertWeight))
    ]


def _gather(
    block: nn.Module, index: int, inside: list[MaskProLayer], batches: list[_Batch], with_gram: bool
) -> tuple[dict[MaskProLayer, Inputs], dict[MaskProExperts, list[_Call]]]:
    """Run a decoder layer dense: add up the inputs of the masked layers inside, and keep what experts are given."""
    units = _units(block.modules(), inside)
    gathered: dict[MaskProLayer, Inputs] = {}
    calls: dict[MaskProExperts, list[_Call]] = {unit: [] for unit in units if isinstance(unit, MaskProExperts)}
    with _dense(inside):
        for batch in batches:
            given = _inputs_of(block, index, units, batch, batch.hidden)[0]
            for experts, known in calls.items():
                for routed in given.pop(experts, []):
                    known.append(_Call(routed.without_padding(batch.attention_mask), len(batch.hidden)))
            for layers, inputs in _together(gathered, given, with_gram):
                for tensor in given[layers[0]]:
                    inputs.update(batch.rows(tensor), len(batch.hidden))
    # An expert that no token was sent to has seen nothing.
    alone = [unit for unit in units if isinstance(unit, MaskProLayer)]
    return {layer: gathered.get(layer) or _nothing(layer, with_gram) for layer in alone}, calls


def _choose_experts(
    experts: MaskProExperts,
    calls: list[_Call],
    names: dict[MaskProLayer, str],
    with_gram: bool,
    choose: Choose,
    in_order: bool = False,
) -> None:
    """
    Choose the masks of experts one by one: of an expert's first weights by the tokens that are sent to it, and of its
    last by what the first make of these, as they are masked if in order.
    """
    base, masked = experts.base_layer, {layer.parameter_name: layer for layer in experts.masked() if layer in names}
    for number in range(max(layer.experts for layer in masked.values())):
        sent = [(call.routed.experts == number).any(1) for call in calls]
        rows = [call.routed.tokens[here] for call, here in zip(calls, sent, strict=True)]
        dense = [None if call.dense is None else call.dense[here] for call, here in zip(calls, sent, strict=True)]
        if sum(map(len, rows)) < FEWEST_TOKENS:
            for layer in masked.values():
                if number < layer.experts:
                    choose(names[layer], layer, _nothing(layer, with_gram), number)
            continue
        first = "gate_up_proj" if base.has_gate else "up_proj"
        for parameter in (first, "down_proj"):
            weight = experts.matrix(parameter, number)
            kept = weight
            if parameter in masked:
                layer = masked[parameter]
                inputs = _nothing(layer, with_gram)
                for call, own, beside in zip(calls, rows, dense, strict=True):
                    if in_order:
                        inputs.update_beside_dense(own, beside, call.sequences)
                    else:
                        inputs.update(own, call.sequences)
                if in_order:
                    inputs.complete()
                mask = choose(names[layer], layer, inputs, number)
                if in_order:
                    kept = weight.masked_fill(~mask.transpose(1, 2).flatten(1), 0)
            if parameter == first:
                bias = base.get_parameter(f"{first}_bias")[number] if base.has_bias else None
                activate = base._apply_gate if base.has_gate else base.act_fn
                rows = [activate(F.linear(own, kept, bias)) for own in rows]
                dense = [None if own is None else activate(F.linear(own, weight, bias)) for own in dense]


def _choose_in_order(
    block: nn.Module,
    index: int,
    inside: list[MaskProLayer],
    batches: list[_Batch],
    names: dict[MaskProLayer, str],
    with_gram: bool,
    choose: Choose,
) -> None:
    """Choose the masks of a decoder layer stage by stage, and hand on what the dense model makes of the tokens."""
    dense: list[_Given] = []
    stages: list[list[Unit]] = []
    units = _units(block.modules(), inside)
    with _dense(inside):
        for batch in batches:
            hidden = batch.hidden if batch.dense_hidden is None else batch.dense_hidden
            given, batch.dense_hidden = _inputs_of(block, index, units, batch, hidden)
            dense.append(given)
            _add_stages(stages, given)
        chosen: set[MaskProLayer] = set()
        # Those that are never called are given nothing.
        stages += [[unit] for unit in units if not any(unit in stage for stage in stages)]
        for stage in stages:
            gathered: dict[MaskProLayer, Inputs] = {}
            routed: list[_Call] = []
            finished = _finished(block, chosen)
            for batch, known in zip(batches, dense, strict=True):
                dense_given = {unit: known.pop(unit, []) for unit in stage}
                calls = sum(map(len, dense_given.values()))
                with batch.remembering(finished):
                    given, _ = _inputs_of(block, index, stage, batch, batch.hidden, stop_after=calls)
                if isinstance(stage[0], MaskProExperts):
                    for call, other in zip(given.pop(stage[0], []), dense_given[stage[0]], strict=True):
                        own, beside = (each.without_padding(batch.attention_mask) for each in (call, other))
                        routed.append(_Call(own, len(batch.hidden), beside.tokens))
                for layers, inputs in _together(gathered, given, with_gram):
                    tensors, others = given[layers[0]], dense_given[layers[0]]
                    # What one expert is sent of the dense model's tokens need not be the same tokens.
                    same = len(tensors) == len(others) and all(map(batch.is_row_a_token, tensors + others))
                    for tensor, other in zip(tensors, others if same else [None] * len(tensors), strict=True):
                        beside = None if other is None else batch.rows(other)
                        inputs.update_beside_dense(batch.rows(tensor), beside, len(batch.hidden))
            for inputs in set(gathered.values()):
                inputs.complete()
            for unit in stage:
                if isinstance(unit, MaskProExperts):
                    _choose_experts(unit, routed, names, with_gram, choose, in_order=True)
                else:
                    choose(names[unit], unit, gathered.get(unit) or _nothing(unit, with_gram))
            for layer in [layer for unit in stage for layer in unit.modules() if layer in names]:
                layer.dense = False
                chosen.add(layer)


def _finished(module: nn.Module, chosen: set[MaskProLayer]) -> list[nn.Module]:
    """The outermost modules inside that have masks, all of which are chosen."""
    masked = {inner for inner in module.modules() if isinstance(inner, MaskProLayer)}
    if not masked:
        return []
    if masked <= chosen:
        return [module]
    return [found for child in module.children() for found in _finished(child, chosen)]


def _add_stages(stages: list[list[Unit]], given: _Given) -> None:
    """Sort layers that no batch before has reached: those that are given the same tensor are one stage."""
    known = {layer for stage in stages for layer in stage}
    last: torch.Tensor | None = None
    for layer, (tensor, *_) in given.items():
        if layer not in known:
            if tensor is not last:
                stages.append([])
            stages[-1].append(layer)
            last = tensor


def _inputs_of(
    block: nn.Module,
    index: int,
    wanted: list[Unit],
    batch: _Batch,
    hidden: torch.Tensor,
    stop_after: int | None = None,
) -> tuple[_Given, torch.Tensor]:
    """
    Run a decoder layer on one batch: what the wanted layers are given, and its output. It goes no further than so many
    calls of theirs.
    """
    given: _Given = {}
    calls = 0

    def record(unit: Unit, what: Any) -> None:
        nonlocal calls
        given.setdefault(unit, []).append(what)
        calls += 1
        if calls == stop_after:
            raise _StopForward

    output = hidden
    with _recording(wanted, record), suppress(_StopForward):
        output = batch.run(block, index, hidden)
    return given, output


def _together(
    gathered: dict[MaskProLayer, Inputs], given: _Given, with_gram: bool
) -> Iterator[tuple[list[MaskProLayer], Inputs]]:
    """Layers that were given the same until now, with what adds it up; of those that were, some may part."""
    before = dict(gathered)
    shared: dict[tuple[int, ...], list[MaskProLayer]] = {}
    for layer, tensors in given.items():
        shared.setdefault((id(before.get(layer)), *map(id, tensors)), []).append(layer)
    for layers in shared.values():
        tensors, inputs = given[layers[0]], before.get(layers[0])
        if inputs is None:
            inputs = Inputs(tensors[0].shape[-1], tensors[0].device, with_gram)
        elif any(other is inputs and layer not in layers for layer, other in before.items()):
            inputs = copy.deepcopy(inputs)
        gathered.update(dict.fromkeys(layers, inputs))
        yield layers, inputs


@contextmanager
def _dense(layers: list[MaskProLayer]) -> Iterator[None]:
    """Let layers apply no mask."""
    for layer in layers:
        layer.dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.dense = False


def _nothing(layer: MaskProLayer, with_gram: bool) -> Inputs:
    return Inputs(layer.in_features, layer.base_weight.device, with_gram)


def _choose_at_once(
    model: nn.Module,
    left: dict[MaskProLayer, str],
    batches: list[dict[str, Any]],
    with_gram: bool,
    choose: Choose,
    in_order: bool,
) -> None:
    """Choose the masks of layers from one pass over the model, in which they are dense."""
    gathered: dict[MaskProLayer, Inputs] = {}
    units = _units(model.modules(), left)
    routed: dict[MaskProExperts, list[_Call]] = {unit: [] for unit in units if isinstance(unit, MaskProExperts)}
    if with_gram or routed:
        # The inputs of experts add up one expert after the other, from the tokens of all.
        most = sum(4 * unit.in_features**2 for unit in units if isinstance(unit, MaskProLayer)) if with_gram else 0
        last = [experts.matrix("down_proj", 0) for experts in routed]
        most += sum(map(tokens_in, batches)) * sum(len(weight) * weight.itemsize for weight in last)
        logger.warning(
            f"calibration: {listed(list(left.values()))} lie in no list of layers that run one after the other; they "
            f"are gathered in one pass, which takes up to {most / 2**20:,.0f} MiB."
        )
    with _dense(list(left)), _stopping_at_head(model, left):
        for batch in tqdm(batches, desc="calibration"):
            calls: list[tuple[Unit, Any]] = []
            with _recording(units, lambda *call, calls=calls: calls.append(call)):
                arguments = _run(model, batch)
            given: _Given = {}
            for unit, what in calls:
                if isinstance(unit, MaskProExperts):
                    tokens = what.without_padding(_attention_mask(model, unit, arguments))
                    routed[unit].append(_Call(tokens, sequences_in(batch)))
                else:
                    given.setdefault(unit, []).append(what)
            for layers, inputs in _together(gathered, given, with_gram):
                attention_mask = _attention_mask(model, layers[0], arguments)
                for tensor in given[layers[0]]:
                    rows = _rows(tensor, attention_mask)
                    if in_order:
                        inputs.update_beside_dense(rows, None, len(tensor))
                    else:
                        inputs.update(rows, len(tensor))
    if in_order:
        for inputs in set(gathered.values()):
            inputs.complete()
    alone = [unit for unit in units if isinstance(unit, MaskProLayer)]
    for layer in alone:
        choose(left[layer], layer, gathered.get(layer) or _nothing(layer, with_gram))
    for experts, known in routed.items():
        _choose_experts(experts, known, left, with_gram, choose, in_order)


def _stacks(model: nn.Module, names: dict[MaskProLayer, str], batch: dict[str, Any]) -> list[list[nn.Module]]:
    """
    What can be walked, in the order in which it runs: of every outermost `nn.ModuleList` the modules that a batch
    runs, if each is given what the one before it has put out.
    """
    ran: dict[nn.ModuleList, list[nn.Module]] = {}
    handed_on: dict[nn.ModuleList, Any] = {}
    broken: set[nn.ModuleList] = set()
    handles = []

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: nn.ModuleList) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        known = ran.setdefault(blocks, [])
        if not isinstance(states, torch.Tensor) or block in known or (known and states is not handed_on[blocks]):
            broken.add(blocks)
        known.append(block)

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any, blocks: nn.ModuleList) -> None:
        handed_on[blocks] = output[0] if isinstance(output, tuple) else output

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for blocks in lists:
        for block in blocks:
            handles.append(block.register_forward_pre_hook(partial(enter, blocks=blocks), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(leave, blocks=blocks)))
    try:
        with _dense(list(names)), _stopping_at_head(model, names):
            _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    taken: set[nn.Module] = set()
    for blocks in lists:
        masked = [layer for block in ran.get(blocks, []) for layer in block.modules() if layer in names]
        # A layer that several of them share cannot be chosen by what one is given.
        if blocks in broken or not masked or len(set(masked)) < len(masked) or taken & set(masked):
            ran.pop(blocks, None)
        else:
            taken.update(masked)
    return list(ran.values())


def one_pass(model: nn.Module, batch: dict[str, Any]) -> None:
    """Run a model on a batch, up to its output head if that is dense."""
    with _stopping_at_head(model, [module for module in model.modules() if isinstance(module, MaskProLayer)]):
        _run(model, batch)


def _run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Run a model on what it reads of a batch: labels are for a loss, but make an encoder-decoder's inputs too."""
    base = _pretrained(model)
    with_labels = base is not None and base.config.is_encoder_decoder
    device = next(model.parameters()).device
    inputs = send_to_device({key: value for key, value in batch.items() if key != "labels" or with_labels}, device)
    with suppress(_StopForward):
        model(**inputs | without_cache(model))
    return inputs


def _pretrained(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _attention_mask(model: nn.Module, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Which tokens of what a module is given are none: a decoder beside an encoder has its own."""
    base = _pretrained(model)
    beside = base is not None and base.config.is_encoder_decoder and module not in set(base.get_encoder().modules())
    return inputs.get("decoder_attention_mask" if beside else "attention_mask")


@contextmanager
def _stopping_at_head(model: nn.Module, masked: Collection[MaskProLayer]) -> Iterator[None]:
    """Let a forward pass end where logits would be made, which take more memory than anything before them."""

    def stop(*_: Any) -> None:
        raise _StopForward

    base = _pretrained(model)
    head = None if base is None else base.get_output_embeddings()
    handle = None if head is None or head in masked else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _recording(units: list[Unit], record: Callable[[Unit, Any], None]) -> Iterator[None]:
    """Hand on what layers and experts are given, call by call."""

    def hand_on(unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if not isinstance(unit, MaskProExperts):
            record(unit, given[0])
        # Of others it is not known which tokens go where.
        elif has_kernels(unit.base_layer):
            record(unit, Routed(given[0], given[1]))

    handles = [unit.register_forward_pre_hook(hand_on, with_kwargs=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _capture(
    model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, Any]], dense: list[MaskProLayer]
) -> list[_Batch]:
    """
    What every one of the blocks is given in the dense model: models that mix kinds of attention give each its own mask
    and positions. Only the first is computed, for what else it hands on; the others pass their input on.
    """
    captured: list[_Batch] = []
    rest: list[tuple[Any, ...] | None] = [None]
    handed_on: list[Any] = [None]

    def compute(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        rest[:] = [output[1:] if isinstance(output, tuple) else None]
        handed_on[:] = [output[0] if isinstance(output, tuple) else output]
        return output

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if rest[0] is None else (hidden, *rest[0])

    def capture(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> None:
        states, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        if index == 0:
            captured.append(_Batch(states))
        elif states is not handed_on[0]:
            raise _StopForward
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        captured[-1].arguments.append((args, others))
        if index == len(blocks) - 1:
            raise _StopForward

    handles = [
        block.register_forward_pre_hook(partial(capture, index=index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    forwards = {block: pass_on if index else partial(compute, block.forward) for index, block in enumerate(blocks)}
    try:
        with _running(forwards), _dense(dense):
            for number, batch in enumerate(tqdm(batches, desc="reading the calibration text"), 1):
                inputs = _run(model, batch)
                if len(captured) != number or len(captured[-1].arguments) != len(blocks):
                    raise ValueError(
                        f"batch {number} of {len(batches)} takes another way through the model than the first; "
                        "calibrate on batches that have the same arguments."
                    )
                captured[-1].attention_mask = _attention_mask(model, blocks[0], inputs)
    finally:
        for handle in handles:
            handle.remove()
    return captured
