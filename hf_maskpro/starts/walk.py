"""The calibration walk: decoder layer by decoder layer, each seeing what the masked layers before it produce."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..tuner import MaskProLayer, evaluating, masked_layers
from ..tuner.base import listed


logger = logging.getLogger(__name__)


class Inputs:
    """
    What a layer's inputs X of shape `[tokens, in_features]` add up to, in float32.

    Attributes:
        squares (`torch.Tensor`): Sum of the squares of every feature, `[in_features]`.
        gram (`torch.Tensor` or `None`): X^T X, `[in_features, in_features]`, if asked for; in a walk by stages of
            tokens of size 1, so that a few massive ones do not rule.
        lost (`torch.Tensor` or `None`): (X_dense - X)^T X of such tokens, where X_dense is what the dense model gives
            the layer: what the masks before it have lost.
        sequences (`int`): How many sequences the tokens came in.
    """

    def __init__(self, in_features: int, device: torch.device, with_gram: bool):
        self.squares = torch.zeros(in_features, device=device)
        self.gram = torch.zeros(in_features, in_features, device=device) if with_gram else None
        self.lost: torch.Tensor | None = None
        self.sequences = 0

    def update(self, rows: torch.Tensor, sequences: int) -> None:
        """Add inputs `[tokens, in_features]`."""
        rows = rows.float()
        self.sequences += sequences
        if self.gram is None:
            self.squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.squares = self.gram.diagonal()

    def update_beside_dense(self, rows: torch.Tensor, dense: torch.Tensor | None, sequences: int) -> None:
        """Add inputs, and if they are known those that the dense model would have had for the same tokens."""
        assert self.gram is not None
        self.sequences += sequences
        exact = rows.float()
        squares = exact.square()
        self.squares += squares.sum(0)
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
        """Fill the lower half of the Gram matrix."""
        assert self.gram is not None
        self.gram = self.gram.triu() + self.gram.triu(1).T


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

    def remembering(self, finished: list[nn.Module]) -> AbstractContextManager[None]:
        """Let modules whose masks are all chosen compute what they put out once, and say it again in later runs."""
        return _running(
            {
                module: partial(_remember, module.forward, self.known.setdefault(module, []), count())
                for module in finished
            }
        )

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


Choose = Callable[[str, MaskProLayer, Inputs], None]


@torch.no_grad()
def walk(
    model: nn.Module,
    adapter_name: str,
    batches: list[dict[str, Any]],
    with_gram: bool,
    choose: Choose,
    in_order: bool = False,
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
        choose (`Callable`): Sets the mask of a layer, given its name and its inputs.
        in_order (`bool`): Go by stages. The inputs of a decoder layer's dense linear layers, and what they put out,
            are in memory meanwhile.

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
            _walk_blocks(blocks, captured, names, with_gram, choose, in_order)
            left = {layer: name for layer, name in left.items() if layer not in inside}
        if left:
            _choose_at_once(model, left, batches, with_gram or in_order, choose, in_order)
        for layer in names:
            layer.forget_masked_weight()


def _walk_blocks(
    blocks: list[nn.Module],
    captured: list[_Batch],
    names: dict[MaskProLayer, str],
    with_gram: bool,
    choose: Choose,
    in_order: bool,
) -> None:
    """Choose the masks of layers that run one after the other."""
    for index, block in enumerate(tqdm(blocks, desc="calibration")):
        inside = [layer for layer in block.modules() if layer in names]
        if in_order:
            _choose_in_order(block, index, inside, captured, names, choose)
        else:
            gathered = _gather(block, index, inside, captured, with_gram)
            for layer in inside:
                choose(names[layer], layer, gathered[layer])
        for batch in captured:
            # Of a walk by stages, all but the last are known.
            with batch.remembering(list(batch.known)):
                batch.hidden = batch.run(block, index, batch.hidden)
            batch.known.clear()
        for layer in inside:
            layer.forget_masked_weight()


# What every layer is given in one batch, in the order in which they run: a tensor a call.
_Given = dict[MaskProLayer, list[torch.Tensor]]


def _gather(
    block: nn.Module, index: int, inside: list[MaskProLayer], batches: list[_Batch], with_gram: bool
) -> dict[MaskProLayer, Inputs]:
    """Run a decoder layer dense, and add up the inputs of the masked layers inside."""
    gathered: dict[MaskProLayer, Inputs] = {}
    with _dense(inside):
        for batch in batches:
            given = _inputs_of(block, index, inside, batch, batch.hidden)[0]
            for layers, inputs in _together(gathered, given, with_gram):
                for tensor in given[layers[0]]:
                    inputs.update(batch.rows(tensor), len(batch.hidden))
    # An expert that no token was sent to has seen nothing.
    return {layer: gathered.get(layer) or _nothing(layer, with_gram) for layer in inside}


def _choose_in_order(
    block: nn.Module,
    index: int,
    inside: list[MaskProLayer],
    batches: list[_Batch],
    names: dict[MaskProLayer, str],
    choose: Choose,
) -> None:
    """Choose the masks of a decoder layer stage by stage, and hand on what the dense model makes of the tokens."""
    dense: list[_Given] = []
    stages: list[list[MaskProLayer]] = []
    with _dense(inside):
        for batch in batches:
            hidden = batch.hidden if batch.dense_hidden is None else batch.dense_hidden
            given, batch.dense_hidden = _inputs_of(block, index, inside, batch, hidden)
            dense.append(given)
            _add_stages(stages, given)
        chosen: set[MaskProLayer] = set()
        never = [layer for layer in inside if not any(layer in stage for stage in stages)]
        for stage in stages:
            gathered: dict[MaskProLayer, Inputs] = {}
            finished = _finished(block, chosen)
            for batch, known in zip(batches, dense, strict=True):
                dense_given = {layer: known.pop(layer, []) for layer in stage}
                calls = sum(map(len, dense_given.values()))
                with batch.remembering(finished):
                    given, _ = _inputs_of(block, index, stage, batch, batch.hidden, stop_after=calls)
                for layers, inputs in _together(gathered, given, True):
                    tensors, others = given[layers[0]], dense_given[layers[0]]
                    # What one expert is sent of the dense model's tokens need not be the same tokens.
                    same = len(tensors) == len(others) and all(map(batch.is_row_a_token, tensors + others))
                    for tensor, other in zip(tensors, others if same else [None] * len(tensors), strict=True):
                        beside = None if other is None else batch.rows(other)
                        inputs.update_beside_dense(batch.rows(tensor), beside, len(batch.hidden))
            for inputs in set(gathered.values()):
                inputs.complete()
            for layer in stage:
                choose(names[layer], layer, gathered.get(layer) or _nothing(layer, True))
                layer.dense = False
            chosen.update(stage)
        for layer in never:
            choose(names[layer], layer, _nothing(layer, True))


def _finished(module: nn.Module, chosen: set[MaskProLayer]) -> list[nn.Module]:
    """The outermost modules inside that have masks, all of which are chosen."""
    masked = {inner for inner in module.modules() if isinstance(inner, MaskProLayer)}
    if not masked:
        return []
    if masked <= chosen:
        return [module]
    return [found for child in module.children() for found in _finished(child, chosen)]


def _add_stages(stages: list[list[MaskProLayer]], given: _Given) -> None:
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
    wanted: list[MaskProLayer],
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

    def record(layer: MaskProLayer, tensor: torch.Tensor) -> None:
        nonlocal calls
        given.setdefault(layer, []).append(tensor)
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
    return Inputs(layer.in_features, layer.get_base_layer().weight.device, with_gram)


def _choose_at_once(
    model: nn.Module,
    left: dict[MaskProLayer, str],
    batches: list[dict[str, Any]],
    with_gram: bool,
    choose: Choose,
    in_order: bool,
) -> None:
    """Choose the masks of layers from one pass over the model, in which they are dense."""
    if with_gram:
        most = sum(4 * layer.in_features**2 for layer in left)
        logger.warning(
            f"calibration: {listed(list(left.values()))} lie in no list of layers that run one after the other; they "
            f"are gathered in one pass, which takes up to {most / 2**20:,.0f} MiB."
        )
    gathered: dict[MaskProLayer, Inputs] = {}
    with _dense(list(left)), _stopping_at_head(model, left):
        for batch in tqdm(batches, desc="calibration"):
            calls: list[tuple[MaskProLayer, torch.Tensor]] = []
            with _recording(list(left), lambda *call, calls=calls: calls.append(call)):
                arguments = _run(model, batch)
            given: _Given = {}
            for layer, tensor in calls:
                given.setdefault(layer, []).append(tensor)
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
    if unseen := [name for layer, name in left.items() if layer not in gathered]:
        logger.warning(f"calibration: {listed(unseen)} saw no data and keep their largest weights.")
    for layer, name in left.items():
        choose(name, layer, gathered.get(layer) or _nothing(layer, with_gram))


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
    """Run a model on a batch, up to its output head."""
    with _stopping_at_head(model, {}):
        _run(model, batch)


def _run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Run a model on what it reads of a batch: labels are for a loss, but make an encoder-decoder's inputs too."""
    base = _pretrained(model)
    with_labels = base is not None and base.config.is_encoder_decoder
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels" or with_labels}
    with suppress(_StopForward):
        model(**inputs, use_cache=False)
    return inputs


def _pretrained(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _attention_mask(model: nn.Module, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """Which tokens of what a module is given are none: a decoder beside an encoder has its own."""
    base = _pretrained(model)
    beside = base is not None and base.config.is_encoder_decoder and module not in set(base.get_encoder().modules())
    return inputs.get("decoder_attention_mask" if beside else "attention_mask")


@contextmanager
def _stopping_at_head(model: nn.Module, names: dict[MaskProLayer, str]) -> Iterator[None]:
    """Let a forward pass end where logits would be made, which take more memory than anything before them."""

    def stop(*_: Any) -> None:
        raise _StopForward

    base = _pretrained(model)
    head = None if base is None else base.get_output_embeddings()
    handle = None if head is None or head in names else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _recording(layers: list[MaskProLayer], record: Callable[[MaskProLayer, torch.Tensor], None]) -> Iterator[None]:
    """Hand on what layers are given, call by call."""
    handles = [layer.register_forward_pre_hook(lambda layer, args: record(layer, args[0])) for layer in layers]
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
