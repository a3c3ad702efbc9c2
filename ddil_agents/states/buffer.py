"""The replay buffer: states of three sources in one TorchRL buffer on the device, each source's share set by β at every draw.

    source ~ Cat(β) ,   state ~ ρ_source ,   so that   state ~ Σᵢ βᵢ ρᵢ            DDIL §4.1, Alg. 1

    ρᵢ(j) = p_j^a / Σ_k p_k^a over the states k of source i              Schaul et al. 2016, Eq. 1 (all p equal: uniform)

TorchRL's own ensemble draws a fixed number of sources a batch, in equal chunks; here the source is drawn anew for every sample.

    buffer = SourceBuffer(4096, device="cuda")
    buffer.extend(states)                           # keys source, x_t, t, …
    batch = buffer.sample(256, (0.5, 0.1, 0.4))     # the same keys, and index
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import Writer

from ddil_agents.states.beta import SOURCES, draw_sources
from ddil_env.expert import check_device

logging.getLogger("torchrl").setLevel(logging.WARNING)  # its INFO line for each buffer says nothing to a user


class _OnDisk:
    """What TorchRL's `dumps` and `loads` ask of a part: its state_dict in a file that loads with weights_only."""

    def dumps(self, path: Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(path) / "state.pt")  # type: ignore[attr-defined]

    def loads(self, path: Path) -> None:
        self.load_state_dict(torch.load(Path(path) / "state.pt", weights_only=True))  # type: ignore[attr-defined]


class SourceWriter(_OnDisk, Writer):
    """One ring per source, side by side in one flat storage: source i owns the slots starts[i] … starts[i] + capacities[i] − 1.

    Cursors and counts are Python integers, so that a draw reads them without waiting for the device.

    Attributes:
        arriving: Rows of each source in the next `extend`, where they lie source after source; None: they are counted and sorted there.
    """

    def __init__(self, capacities: Sequence[int]) -> None:
        super().__init__()
        self.capacities = list(capacities)
        self.starts = [sum(self.capacities[:i]) for i in range(len(self.capacities))]
        self.arriving: Sequence[int] | None = None
        self._empty()

    def add(self, data: TensorDictBase) -> int:
        return int(self.extend(data.unsqueeze(0)))

    def extend(self, data: TensorDictBase) -> Tensor:
        """Writes each row into its source's ring over that source's oldest, and returns the rows' slots (n,)."""
        if len(self._storage) < self._storage.max_size:  # once: every slot is addressable, however the rings fill up
            self._storage.set(slice(0, self._storage.max_size), data[:1].expand(self._storage.max_size))
        source, order, counts = data["source"], None, self.arriving
        if counts is None:
            counts = torch.bincount(source.long().cpu(), minlength=len(self.capacities)).tolist()
            order = source.argsort(stable=True)
            data = data[order]
        slots, first = [], 0
        for i, (start, capacity, n) in enumerate(zip(self.starts, self.capacities, counts, strict=True)):
            slots.append(start + (self.cursors[i] + torch.arange(n, device=source.device)) % capacity)
            if n:
                kept = slice(max(n - capacity, 0), n)  # of more rows than the ring holds, the newest
                self._storage.set(slots[i][kept], data[first : first + n][kept], set_cursor=False)
            first += n
            self.cursors[i] = (self.cursors[i] + n) % capacity
            self.counts[i] = min(self.counts[i] + n, capacity)
        index = torch.cat(slots)
        return index if order is None else torch.empty_like(index).scatter(0, order, index)

    def _empty(self, empty_write_count: bool = True) -> None:
        self.cursors = [0] * len(self.capacities)
        self.counts = [0] * len(self.capacities)

    def state_dict(self) -> dict[str, Any]:
        return {"cursors": list(self.cursors), "counts": list(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cursors, self.counts = list(state_dict["cursors"]), list(state_dict["counts"])


class SourceSampler(_OnDisk, Sampler):
    """Draws a source from `beta` for each sample, then one of its states in proportion to its priority.

    An importance-sampling correction of the priorities is left out: within a source the prioritised distribution *is* the one trained on.
    """

    def __init__(self, writer: SourceWriter, device: torch.device, prioritised: bool, exponent: float) -> None:
        self.writer, self.prioritised, self.exponent = writer, prioritised, exponent
        self.priorities = torch.zeros(sum(writer.capacities), dtype=torch.float64, device=device)  # p^a; 0 where no state lies
        self.starts = torch.tensor(writer.starts[1:], device=device)
        self.beta: tuple[float, ...] = ()
        self._cumulative: Tensor | None = None

    def extend(self, index: Tensor) -> None:
        """New states are as likely as the likeliest held of their source, so that each is soon drawn."""
        index = index.to(self.priorities.device)
        highest = torch.stack([p.max() for p in self.priorities.split(self.writer.capacities)])  # (3,)
        source = torch.bucketize(index, self.starts, right=True)
        self.priorities[index] = torch.where(highest > 0, highest, 1.0)[source]
        self._cumulative = None

    def add(self, index: int) -> None:
        self.extend(torch.tensor([index]))

    def cumulative(self) -> Tensor:
        """F with F rising from i to i + 1 over the slots of source i, in proportion to priority, (sum of capacities,) float64."""
        if self._cumulative is None:
            totals = [p.cumsum(0) for p in self.priorities.split(self.writer.capacities)]
            self._cumulative = torch.cat([i + total / total[-1].clamp(min=1e-300) for i, total in enumerate(totals)])  # an empty source: i
        return self._cumulative

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        starts, counts = self.writer.starts, self.writer.counts
        drawn = [(b, float(i), float(starts[i] + counts[i] - 1)) for i, b in enumerate(self.beta) if b > 0 and counts[i]]
        if not drawn:
            held = dict(zip(SOURCES, counts, strict=True))
            raise ValueError(f"nothing to draw with beta={self.beta}: the buffer holds {held}; first collect a source that beta draws")
        device, generator = self.priorities.device, self._rng
        beta, source, last = torch.tensor(drawn, dtype=torch.float64).T.to(device, non_blocking=True)  # each (number of sources drawn,)
        choice = draw_sources(beta, batch_size, generator)  # (b,)
        u = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
        # In pieces that torch searches in one thread: on a busy machine a second one costs 8 ms to wake, the search 5 µs.
        pieces = (source[choice] + u).split(batch_size if device.type != "cpu" else 128)
        index = torch.cat([torch.searchsorted(self.cumulative(), piece, right=True) for piece in pieces])
        return torch.minimum(index, last[choice].long()), {}  # i + u may round up to i + 1

    def update_priority(self, index: Tensor, priority: Tensor, *, storage: Storage | None = None) -> None:
        if not self.prioritised:
            raise ValueError("this buffer draws uniformly; build it with prioritised=True to set priorities")
        index, priority = index.to(self.priorities.device), priority.detach().to(self.priorities)
        if index.shape != priority.shape or index.ndim != 1:
            raise ValueError(f"index {tuple(index.shape)} and priority {tuple(priority.shape)}: both must be (b,), one a sample")
        power = (priority + 1e-8) ** self.exponent  # a priority of 0 does not bar a state for ever, Schaul et al. 2016, §3.3
        slot = index.clamp(0, len(self.priorities) - 1)
        wrong = ~((priority >= 0) & (power > 0) & torch.isfinite(power) & (slot == index) & (self.priorities[slot] > 0))
        if wrong.any():
            p, i = priority[wrong][0].item(), index[wrong][0].item()
            raise ValueError(f"priority {p} for index {i}: need a finite priority ≥ 0 and the `index` of a batch drawn here")
        # A state drawn twice keeps its higher priority, in whatever order a GPU writes.
        self.priorities.scatter_reduce_(0, index, power, "amax", include_self=False)
        self._cumulative = None

    def _empty(self) -> None:
        self.priorities.zero_()
        self._cumulative = None

    def state_dict(self) -> dict[str, Any]:
        return {"priorities": self.priorities.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.priorities.copy_(state_dict["priorities"])
        self._cumulative = None


class SourceBuffer:
    """A replay buffer of states that carry their source; `replay` is the TorchRL buffer beneath.

    Args:
        capacity: States held per source: one number for all, or one a source, as a mapping by name or in the order of `SOURCES`.
        device: Where the states lie and are drawn.
        prioritised: Draw in proportion to priority^priority_exponent inside a source; False draws uniformly.
        priority_exponent: 0 is uniform, 1 proportional.
        seed: Seeds the buffer's own generator.

    Raises:
        ValueError: an absent device, a capacity below 1 or not one a source, a negative exponent.
    """

    def __init__(
        self,
        capacity: int | Mapping[str, int] | Sequence[int],
        device: torch.device | str = "cpu",
        prioritised: bool = False,
        priority_exponent: float = 1.0,
        seed: int = 0,
    ) -> None:
        each: Any = capacity
        if isinstance(capacity, Mapping):
            each = [capacity[name] for name in SOURCES] if set(capacity) == set(SOURCES) else []
        capacities = list(each) if isinstance(each, Sequence) else [each] * len(SOURCES)
        if len(capacities) != len(SOURCES) or not all(isinstance(n, int) and n >= 1 for n in capacities):
            raise ValueError(f"capacity={capacity}: need a whole number ≥ 1 for each of {', '.join(SOURCES)}")
        if not (math.isfinite(priority_exponent) and priority_exponent >= 0):
            raise ValueError(f"priority_exponent={priority_exponent}: need a finite number ≥ 0; 0 is uniform, 1 proportional")
        self.device = check_device(device)
        self._writer = SourceWriter(capacities)
        self._sampler = SourceSampler(self._writer, self.device, prioritised, priority_exponent)
        self._build = {"capacities": capacities, "device": self.device.type, "prioritised": prioritised, "exponent": priority_exponent}
        self._fields: dict[Any, tuple[torch.Size, torch.dtype]] = {}  # key → one state's shape and dtype
        self.replay = TensorDictReplayBuffer(
            storage=LazyTensorStorage(sum(capacities), device=self.device),
            sampler=self._sampler,
            writer=self._writer,
            generator=torch.Generator(self.device).manual_seed(seed),
        )

    @property
    def counts(self) -> dict[str, int]:
        """States held, by source."""
        return dict(zip(SOURCES, self._writer.counts, strict=True))

    def __len__(self) -> int:
        return sum(self._writer.counts)

    def extend(self, states: TensorDictBase, counts: Sequence[int] | None = None) -> None:
        """Stores states (n,), detached; a full ring loses its oldest. Rows of several sources may come together.

        Args:
            states: The states, each with its source.
            counts: How many there are of each source, of states that lie source after source, as a collection's do; None: they are
                counted and sorted here, for which a GPU is waited for.

        Raises:
            ValueError: no `source` of shape (n,), a source that does not exist, fields unlike those of the first call, or counts that do
                not sum to n.
        """
        states = states.detach().exclude("index")  # the index of an earlier draw says nothing here
        fields = {k: (v.shape[1:], v.dtype) for k, v in states.items(include_nested=True, leaves_only=True)}
        source = states.get("source", None)
        if states.ndim != 1 or source is None or source.shape != states.shape or source.dtype not in (torch.uint8, torch.int64):
            got = None if source is None else (tuple(source.shape), source.dtype)
            raise ValueError(f"states {tuple(states.shape)} with source {got}: need (n,) states, each with a uint8 or int64 source")
        if changed := [k for k in {**self._fields, **fields} if self._fields and self._fields.get(k) != fields.get(k)]:
            raise ValueError(
                f"{changed[0]!r} was {self._fields.get(changed[0])} at the first extend() and is {fields.get(changed[0])} now; "
                "every state of a buffer has the same keys, shapes and dtypes"
            )
        if counts is not None and (len(counts) != len(SOURCES) or sum(counts) != len(states)):
            raise ValueError(f"counts={[*counts]}: need one for each of {', '.join(SOURCES)}, which sum to the {len(states)} states")
        if len(states) == 0:
            return
        if counts is None:
            low, high = torch.stack(source.aminmax()).tolist()
            if low < 0 or high >= len(SOURCES):
                raise ValueError(f"source {low if low < 0 else high} does not exist; 0 … {len(SOURCES) - 1} are {', '.join(SOURCES)}")
        self._writer.arriving = counts
        try:
            self.replay.extend(states.to(self.device), update_priority=False)
        finally:
            self._writer.arriving = None
        self._fields = fields

    def sample(self, batch_size: int, beta: Sequence[float] | Tensor) -> TensorDict:
        """Draws with replacement: a batch (b,) of the stored keys, and `index`.

        A source of which no state has been collected yet is left out and β renormalised over the others.

        Args:
            batch_size: b, any number ≥ 1.
            beta: β in the order of `SOURCES`, not necessarily summing to 1. As numbers: a tensor on a GPU would be waited for.

        Raises:
            ValueError: β negative, not finite, all 0 or not one a source; nothing held of the sources that it draws.
        """
        shares = tuple(float(b) for b in (beta.flatten().tolist() if isinstance(beta, Tensor) else beta))
        if len(shares) != len(SOURCES) or not all(math.isfinite(b) and b >= 0 for b in shares) or not 0 < sum(shares) < math.inf:
            raise ValueError(f"beta={shares}: need a finite share ≥ 0 for each of {', '.join(SOURCES)}, not all 0")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: draw at least one state")
        self._sampler.beta = shares
        return self.replay.sample(batch_size)

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """Sets the priorities (b,) of the states that were drawn as `index` (b,); of a state drawn twice, the higher counts.

        Raises:
            ValueError: a uniform buffer, a priority that is negative or not finite, an index that holds no state.
        """
        self.replay.update_priority(index, priority)

    def clear(self) -> None:
        """Forgets every state; the generator goes on."""
        self.replay.empty()

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on, copied; of the storage, the slots that hold a state. Loads with weights_only."""
        held = self._sampler.priorities.nonzero().squeeze(1)  # (sum of counts,)
        return {
            "build": dict(self._build),
            "writer": self._writer.state_dict(),
            "sampler": self._sampler.state_dict(),
            "generator": self._sampler._rng.get_state(),
            "states": self.replay.storage.get(held).to_dict() if len(self) else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off: the next draws are bit for bit the same.

        Raises:
            ValueError: the state is of a buffer that was built otherwise, or on another kind of device, or held other fields.
        """
        if state["build"] != self._build:
            raise ValueError(f"the state of a buffer with {state['build']} does not fit one with {self._build}; build it as it was saved")
        self.clear()
        if state["states"]:  # rows lie source after source from each ring's start, where extend() puts them back
            self.extend(TensorDict(state["states"], batch_size=[sum(state["writer"]["counts"])]))
        self._writer.load_state_dict(state["writer"])
        self._sampler.load_state_dict(state["sampler"])
        self._sampler._rng.set_state(state["generator"].cpu())
