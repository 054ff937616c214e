"""The requests of one model of a unit by state, and the model's counters."""

from __future__ import annotations

from collections import OrderedDict

from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.requests import Request, RequestState
from muxjax.scheduling.slot_table import SlotTable
from muxjax.scheduling.specs import ModelSpec


class ModelState:
    """The requests of one model, and its counters.

    Policies may read all attributes. Groups of requests are in order of arrival, oldest first,
    except `deferred`.

    Args:
      spec: the model.

    Attributes:
      spec: the model.
      waiting: requests without pages, in the order in which they are admitted. Changed by the
        methods only.
      first: the first of `waiting`, which policies read before each step; None if it is empty.
      deferred: requests without pages that wait behind `waiting`, in order of their deferral.
      prefilling: requests with pages whose prefix is not fully dispatched.
      running: requests with pages whose prefix is fully dispatched.
      table: the running requests as columns.
      free_slots: device slots without a request.
      preemptions: number of preemptions.
      prompt_tokens: tokens of all prompts so far.
      output_tokens: tokens emitted so far.
      finished: number of requests that have ended.
      prefix_queries: prompt tokens looked up in the prefix cache.
      prefix_hits: prompt tokens found in it.
      prefill_key, decode_key: the model's keys in `FairShare`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self.first: Request | None = None
        self.deferred: OrderedDict[int, Request] = OrderedDict()
        self.prefilling: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self.table = SlotTable(spec.limits.max_seqs)
        self.free_slots = list(range(spec.limits.max_seqs - 1, -1, -1))
        self.preemptions = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.finished = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.prefill_key: StepKey = (spec.name, "prefill")
        self.decode_key: StepKey = (spec.name, "decode")

    def take_slot(self, replica: int) -> int:
        """Removes a free slot of a replica from `free_slots` and returns it."""
        if self.spec.replicas == 1:
            return self.free_slots.pop()
        slots, replicas = self.free_slots, self.spec.replicas
        return slots.pop(max(i for i, slot in enumerate(slots) if slot % replicas == replica))

    def running_on(self, replica: int) -> int:
        """Number of running requests of a replica."""
        replicas = self.spec.replicas
        if replicas == 1:
            return len(self.running)
        return sum([request.slot % replicas == replica for request in self.running.values()])

    @property
    def has_prefill(self) -> bool:
        """Whether there is a prefix to prefill, if pages and slots allow."""
        return bool(self.prefilling or self.waiting or self.deferred)

    @property
    def has_decode(self) -> bool:
        """Whether there is a sequence to decode; all its tokens may be in flight."""
        return bool(self.running)

    def holders(self) -> list[Request]:
        """Requests that hold pages, oldest first."""
        running = list(self.running.values())
        if not self.prefilling:
            return running
        # Both groups are in order, which makes `sorted` fast.
        return sorted([*running, *self.prefilling.values()], key=lambda request: request.order)

    def start_prefill(self, request: Request) -> None:
        """Adds a request that was admitted to `prefilling`."""
        request.state = RequestState.PREFILL
        _insert(self.prefilling, request)

    def start_decode(self, request: Request) -> None:
        """Moves a request whose prefix is fully dispatched to `running`."""
        del self.prefilling[request.id]
        request.state = RequestState.RUNNING
        request.bind_row(self.table)
        _insert(self.running, request)

    def remove(self, request: Request) -> None:
        """Removes a request from its group; it keeps its slot and its state."""
        if request.state is RequestState.RUNNING:
            request.unbind_row()
        groups = {
            RequestState.WAITING: self.waiting,
            RequestState.DEFERRED: self.deferred,
            RequestState.PREFILL: self.prefilling,
            RequestState.RUNNING: self.running,
        }
        del groups[request.state][request.id]
        if request is self.first:
            self._find_first()

    def defer(self, request: Request) -> None:
        """Moves a waiting request to the end of `deferred`."""
        self.remove(request)
        request.state = RequestState.DEFERRED
        self.deferred[request.id] = request

    def recall(self, request: Request) -> None:
        """Moves a deferred request to `waiting`, at the place given by its new `order`."""
        del self.deferred[request.id]
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Adds a request to `waiting` at the place given by its `order`, usually the end."""
        last = next(reversed(self.waiting.values()), None)
        if last is not None and last.order > request.order:
            self.requeue(request)
            return
        request.state = RequestState.WAITING
        self.waiting[request.id] = request
        if last is None:
            self.first = request

    def requeue(self, request: Request) -> None:
        """Adds a request to `waiting`, before all requests of a later `order`."""
        request.state = RequestState.WAITING
        older: list[Request] = []
        for other in self.waiting.values():
            if other.order > request.order:
                break
            older.append(other)
        for other in (request, *reversed(older)):
            self.waiting[other.id] = other
            self.waiting.move_to_end(other.id, last=False)
        self._find_first()

    def _find_first(self) -> None:
        self.first = next(iter(self.waiting.values()), None)

    def check_invariants(self) -> None:
        """Raises AssertionError if groups, slots and the requests' own fields are inconsistent."""
        name = self.spec.name
        slots = [request.slot for request in self.holders()]
        assert sorted(slots + self.free_slots) == list(range(self.spec.limits.max_seqs))
        for group, state in (
            (self.waiting, RequestState.WAITING),
            (self.deferred, RequestState.DEFERRED),
            (self.prefilling, RequestState.PREFILL),
            (self.running, RequestState.RUNNING),
        ):
            orders = [request.order for request in group.values()]
            if group is not self.deferred:
                assert orders == sorted(orders), f"{name} is out of order"
            for request in group.values():
                assert request.state is state
                assert 0 <= request.expected_tokens <= request.max_new_tokens
                assert request.pending >= 0
                holds = state in (RequestState.PREFILL, RequestState.RUNNING)
                assert bool(request.blocks) == holds
                assert holds or request.slot == -1
        assert self.first is next(iter(self.waiting.values()), None)
        assert all(r.dispatched < r.prefix_tokens for r in self.prefilling.values())
        self._check_table()

    def _check_table(self) -> None:
        table = self.table
        rows = {request.slot for request in self.running.values()}
        for slot, request in enumerate(table.requests):
            assert (request is not None) == (slot in rows)
            if request is None:
                assert table.limit[slot] == table.expected[slot] == 0
                continue
            assert request.table is table
            assert request is self.running[int(table.ids[slot])]
            assert request.blocks is table.blocks[slot]
            assert len(request.blocks) == table.num_blocks[slot]
            assert len(request.prompt) == table.prompt[slot]
            assert request.max_new_tokens == table.limit[slot]


def _insert(group: dict[int, Request], request: Request) -> None:
    """Adds a request to a group by its `order`; it is usually the youngest."""
    youngest = next(reversed(group.values()), None)
    group[request.id] = request
    if youngest is not None and youngest.order > request.order:
        ordered = sorted(group.values(), key=lambda member: member.order)
        group.clear()
        group.update((member.id, member) for member in ordered)
