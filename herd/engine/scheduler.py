"""Who runs in the next step, with which blocks: continuous batching in plain Python. No torch.

A step is `plan` -> forward -> `commit`. Each step first serves every sequence that needs one position (decode rows), then fills
the token budget with pieces of prompts, oldest request first; the queue is strictly first come, first served. When blocks run
out, the newest sequence gives all of its back and is computed again later. A plan changes nothing but the blocks that
sequences hold, so it can be dropped, and any part of it committed.

Adapters may have virtual tokens (`pin`): keys and values that stand before everything that their requests say. Their blocks are
pinned, every such sequence begins with them, and its own tokens count positions behind them. Everything here but positions and
blocks is counted in tokens.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from herd.engine.blocks import BlockPool, blocks_of
from herd.engine.pins import Pins
from herd.engine.plan import Chunk, Progress, StepPlan
from herd.engine.request import Finish, Request, Sequence
from herd.errors import ConfigError, ContextFullError

__all__ = ["Chunk", "Progress", "Scheduler", "StepPlan"]


class Scheduler:
    """Sequences over a block pool. `max_seqs` run at once, `max_tokens` positions a step, `max_len` positions each.

    Raises ConfigError when the numbers do not fit each other: a sequence of `max_len` must fit into the pool alone, and every
    running sequence must get a row.
    """

    def __init__(self, pool: BlockPool, *, max_seqs: int, max_tokens: int, max_len: int) -> None:
        if min(max_seqs, max_tokens) < 1 or max_len < 2:
            raise ConfigError(
                f"max_seqs {max_seqs}, max_tokens {max_tokens}, max_len {max_len}: give at least 1, 1 and 2"
            )
        if max_tokens < max_seqs:
            raise ConfigError(
                f"max_tokens {max_tokens} is below max_seqs {max_seqs}: every sequence needs a row in a step"
            )
        need = blocks_of(max_len, pool.block_size)
        if need > pool.n_blocks:
            raise ConfigError(
                f"max_len {max_len} needs {need} blocks of {pool.block_size} positions, and the cache has {pool.n_blocks}: "
                f"lower it to {pool.n_blocks * pool.block_size}, or give the cache more memory"
            )
        self.pool, self.max_seqs, self.max_tokens, self.max_len = pool, max_seqs, max_tokens, max_len
        self.pins = Pins(pool, max_len)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._live: dict[str, list[Sequence]] = {}
        self._indices: dict[str, int] = {}
        self._copies: list[tuple[int, int]] = []
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._live

    def sequences(self, request_id: str) -> list[Sequence]:
        """The unfinished continuations of a request; none for an id that is unknown or finished."""
        return list(self._live.get(request_id, ()))

    def room(self, adapter: str | None = None) -> int:
        """The most tokens of a request with `adapter`, prompt and reply together (`Pins.room`). Any thread may ask."""
        return self.pins.room(self.pins.count(adapter))

    def pin(self, adapter: str, count: int) -> list[int]:
        """Blocks for the `count` virtual tokens of `adapter`, in order, for the caller to fill before its first request.

        Between two steps. The newest sequences give their blocks back when none are free. Raises ConfigError with the counts
        when there would be no room for a prompt and a reply, or for a request that runs.
        """
        self.pins.check(count)
        need, live = blocks_of(count, self.pool.block_size), self._all()
        for s in live:
            if len(s.tokens) >= self.pins.room(s.first, need):
                raise ConfigError(
                    f"request {s.request.id!r} has {len(s.tokens)} tokens by now and needs the blocks that {count} virtual "
                    "tokens would take: wait for its end, or give the cache more memory"
                )
        while self.pool.available < need:
            self._preempt(StepPlan(), next(s for s in reversed(self.running) if s.blocks))
        blocks = self.pins.hold(adapter, count)
        for s in live:
            s.room = self.pins.room(s.first)
        return blocks

    def unpin(self, adapter: str) -> None:
        """Free the blocks of an adapter's virtual tokens. Between two steps; none of its requests may be unfinished."""
        self.pins.release(adapter)
        for s in self._all():
            s.room = self.pins.room(s.first)

    def settle(self, make: Callable[[list[tuple[int, int]]], None]) -> None:
        """Have `make` do the copies of a plan that was dropped: before anything else is written into blocks."""
        StepPlan(copies=self._copies).copy(make)

    def _all(self) -> list[Sequence]:
        return [s for sequences in self._live.values() for s in sequences]

    def admissible(self, request: Request) -> None:
        """Raise ContextFullError when `request` can never fit, ConfigError for more continuations than run at once.

        Any thread may ask.
        """
        if request.width > self.max_seqs:
            raise ConfigError(
                f"request {request.id!r} asks for {request.width} continuations, and at most {self.max_seqs} run at once "
                "(max_seqs)"
            )
        length, room, virtual = len(request.prompt), self.room(request.adapter), self.pins.count(request.adapter)
        if length >= room:
            beside = f" beside the {virtual} virtual tokens of adapter {request.adapter!r}" if virtual else ""
            raise ContextFullError(
                f"request {request.id!r}: the prompt has {length} tokens and the context holds {room}{beside}, so there is no "
                "room for a reply: shorten the prompt or raise max_len",
                needed=length + 1,
                available=room,
            )

    def add(self, request: Request) -> list[Sequence]:
        """Queue a request: its continuations, one per candidate.

        Raises what `admissible` raises, and ConfigError for an id that is in use.
        """
        if request.id in self._live:
            raise ConfigError(f"request {request.id!r} is already running: give every request an id of its own")
        self.admissible(request)
        self._arrivals += 1
        first = self.pins.count(request.adapter)
        room = self.pins.room(first)
        sequences = [
            Sequence(request, i, (self._arrivals, i), first=first, room=room) for i in range(request.params.candidates)
        ]
        sequences[0].children = sequences[1:]
        self._live[request.id], self._indices[request.id] = list(sequences), len(sequences)
        self.waiting.append(sequences[0])
        return sequences

    def abort(self, request_id: str) -> list[Sequence]:
        """End a request now, whatever it is doing; the sequences that were ended, none when there was nothing to end."""
        ended = self.sequences(request_id)
        for sequence in ended:
            sequence.children = []
        for sequence in ended:
            self.finish(sequence, "abort")
        return ended

    def finish(self, sequence: Sequence, reason: Finish) -> bool:
        """End one continuation (stop strings, errors). False when it had ended before."""
        if sequence.status == "finished":
            return False
        live = self._live[sequence.request.id]
        live.remove(sequence)
        if not live:
            del self._live[sequence.request.id], self._indices[sequence.request.id]
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:  # a child that has not begun
            for other in live:
                if sequence in other.children:
                    other.children.remove(sequence)
        sequence.status, sequence.finish = "finished", reason
        if sequence.children:  # it ended before its prompt was read: the first child reads it for the others
            heir, *heir.children = sequence.children
            sequence.children = []
            self._wait(heir)
        return True

    def fork(self, parent: Sequence) -> Sequence:
        """A new continuation with all that `parent` has, between two steps (beam search); its last token may be replaced.

        Blocks are shared until one of them writes. Beyond `max_tokens` the newest wait, so keep to the request's width.
        """
        assert parent.status == "running", parent
        index = self._indices[parent.request.id]
        self._indices[parent.request.id] += 1
        child = Sequence(parent.request, index, (parent.order[0], index), first=parent.first, room=parent.room)
        child.tokens = list(parent.tokens)
        child.cached_tokens, child.scored = parent.cached_tokens, parent.scored
        self._inherit(child, parent, parent.computed)
        self._live[parent.request.id].append(child)
        return child

    def plan(self) -> StepPlan:
        """The next step; no rows when there is nothing to do. Takes the drafts of its sequences.

        A plan may be dropped, before or after its copies were made (`StepPlan.copy`): those that are due are the next one's.
        """
        plan = StepPlan(copies=self._copies)  # those of a plan that was dropped are still due
        decodes = [s for s in self.running if len(s.tokens) - s.computed == 1]
        spare = max(0, self.max_tokens - len(decodes))  # for drafts
        for sequence in decodes[: self.max_tokens]:  # forks may have made more: the newest wait
            if sequence.status == "running":
                spare -= self._plan_decode(plan, sequence, spare)
        for sequence in [s for s in self.running if len(s.tokens) - s.computed > 1]:
            if sequence.status == "running":
                self._plan_prompt(plan, sequence)
        while plan.tokens < self.max_tokens and (sequence := self._admit()) is not None:
            self._plan_prompt(plan, sequence)
            assert sequence.status == "running", "it was let in without room"
        assert plan.rows or self.idle, "there is work, but no step for it"
        return plan

    def ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan` while its tokens are not known: the next position of each of its sequences that may go on.

        None when another step would come: a prompt to read, guesses, somebody to let in, blocks or tokens that run out. Changes
        nothing; `extend` takes the blocks, and `plan` is committed first. Sequences that end with it are computed in vain.
        """
        if self.waiting and self._slots(self.waiting[0]) <= self.max_seqs:
            return None
        going = [chunk for chunk in plan.rows if chunk.sequence.status == "running"]
        if len(going) < len(self.running) or not all(_goes_on(chunk) for chunk in going):
            return None
        rows = []
        for chunk in going:
            sequence, most = chunk.sequence, chunk.sequence.request.params.max_tokens
            if len(sequence.tokens) + 1 < sequence.room and (most is None or sequence.made + 1 < most):
                rows.append(Chunk(sequence, chunk.start + 1, 1, True, 1, sequence.blocks, before=sequence.first))
        need = sum(self._lacks(chunk) for chunk in rows)
        return StepPlan(rows) if rows and need <= self.pool.available else None

    def extend(self, plan: StepPlan) -> None:
        """Give the sequences of a plan of `ahead` their blocks."""
        for chunk in plan.rows:
            chunk.sequence.blocks += self.pool.allocate(self._lacks(chunk))

    def _lacks(self, chunk: Chunk) -> int:
        return max(0, blocks_of(chunk.position + 1, self.pool.block_size) - len(chunk.sequence.blocks))

    def commit(self, plan: StepPlan, sampled: Seq[Seq[int]]) -> list[Progress]:
        """Take in what a plan (or some chunks of it) computed. `sampled` has the new tokens of each chunk: none without
        `sample`, one otherwise, with drafts those that were right and the one after them.

        Sequences that have ended since are passed over. Rejected drafts, and tokens after a stop, are as if never computed.
        """
        self._copies = []
        out = []
        for chunk, tokens in zip(plan.rows, sampled, strict=True):
            if chunk.sequence.status == "running":
                out.append(self._commit(chunk, list(tokens)))
        return out

    def check(self) -> None:
        """Assert every invariant, in time proportional to the pool. Right after `plan` or `commit`, at any time."""
        live = self._all()
        self.pool.check([s.blocks for s in live])
        assert self.pool.pinned == self.pins.blocks
        assert list(self.waiting) == sorted(self.waiting, key=_order)
        assert self.running == sorted(self.running, key=_order)
        children = [c for s in live for c in s.children]
        assert sorted([*self.waiting, *self.running, *children], key=_order) == sorted(live, key=_order)
        owners: dict[tuple[int, int], Sequence] = {}
        for s in live:
            assert s.status == ("running" if s in self.running else "waiting")
            assert s.status == "running" or not s.blocks
            assert 0 <= s.computed < len(s.tokens) <= s.room
            assert s.room == self.pins.room(s.first)
            held = s.position if s.blocks else 0
            assert s.blocks or not s.computed
            assert held <= len(s.blocks) * self.pool.block_size
            assert len(s.digests) == held // self.pool.block_size
            for i, block in enumerate(s.blocks):
                if self.pool.references(block) > 1:
                    other = owners.setdefault((block, i), s)
                    first, last = (
                        i * self.pool.block_size,
                        min((i + 1) * self.pool.block_size, s.position, other.position),
                    )
                    assert s.ids(first, last) == other.ids(first, last), f"{s} and {other} share block {block}"
        places: dict[int, int] = {}
        for block, i in owners:
            assert places.setdefault(block, i) == i, f"block {block} lies at two places"

    def _plan_decode(self, plan: StepPlan, sequence: Sequence, spare: int) -> int:
        """The row of a sequence that needs one position, with drafts when there is room for them. Returns their number."""
        room = min(spare, sequence.room - len(sequence.tokens) - 1)
        if sequence.request.params.max_tokens is not None:
            room = min(room, sequence.request.params.max_tokens - sequence.made - 1)
        drafts, sequence.drafts = sequence.drafts[: max(room, 0)], ()
        start = sequence.computed
        if drafts and self._missing(sequence, start + 1 + len(drafts)) > self.pool.available:
            drafts = ()  # guesses take nobody's blocks
        if not self._reserve(plan, sequence, start + 1 + len(drafts)):
            return 0
        count = 1 + len(drafts)
        plan.rows.append(Chunk(sequence, start, count, True, count, sequence.blocks, drafts, sequence.first))
        return len(drafts)

    def _plan_prompt(self, plan: StepPlan, sequence: Sequence) -> None:
        """As much of a prompt (or of a preempted sequence) as the budget allows."""
        start, total = sequence.computed, len(sequence.tokens)
        count = min(total - start, self.max_tokens - plan.tokens)
        if count < 1 or not self._reserve(plan, sequence, start + count):
            return
        sample = start + count == total
        logits = int(sample)
        if _scores(sequence):
            logits = max(logits, start + count - max(start, sequence.scored))
        plan.rows.append(Chunk(sequence, start, count, sample, logits, sequence.blocks, before=sequence.first))

    def _admit(self) -> Sequence | None:
        """The oldest waiting sequence, made running with the blocks that are known of it; None when it has to wait.

        It has to find room for all of its tokens, and leave a block to each running one: otherwise it would be preempted at
        once. Nobody passes it.
        """
        if not self.waiting or self.pool.available <= len(self.running):
            return None
        sequence = self.waiting[0]
        if self._slots(sequence) > self.max_seqs:
            return None
        request, size, first = sequence.request, self.pool.block_size, sequence.first
        # Positions whose logits are wanted must run, the last one in any case.
        limit = sequence.scored if _scores(sequence) else len(sequence.tokens) - 1
        held = self.pins.of(request.adapter)
        pinned = [] if held is None else held.blocks
        blocks, digests = self.pool.lookup(
            sequence.ids(0, first + limit), salt=request.salt, adapter=request.adapter, pinned=pinned[: first // size]
        )
        known = max(first, len(blocks) * size)
        # The last block of virtual tokens may have room for real ones: it is copied before they are written.
        blocks += pinned[len(blocks) :]
        need = blocks_of(first + len(sequence.tokens), size) - known // size
        idle_hits = sum(self.pool.references(block) == 0 for block in blocks)
        if need + idle_hits + len(self.running) > self.pool.available:
            return None
        if self._is_being_read(sequence, known, limit):
            return None
        self.pool.share(blocks)
        sequence.blocks, sequence.digests, sequence.computed = blocks, digests, known - first
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        self.waiting.popleft()
        sequence.status = "running"
        insort(self.running, sequence, key=_order)
        return sequence

    def _is_being_read(self, candidate: Sequence, known: int, limit: int) -> bool:
        """Whether a running sequence is about to compute at least half of what `candidate` would, beyond its `known` positions
        (virtual ones included).

        Then it is worth waiting for those blocks: equal prompts that arrive together are read once. Whoever is waited for has
        work in every step, and one that ends or is preempted is not waited for any longer.
        """
        if not self.pool.prefix_cache:
            return False
        size, request, first = self.pool.block_size, candidate.request, candidate.first
        least = known + max(size, (first + len(candidate.tokens) - known + 1) // 2)
        for other in self.running:
            if len(other.tokens) - other.computed < 2 or (other.request.salt, other.request.adapter) != (
                request.salt,
                request.adapter,
            ):
                continue
            end = (first + min(limit, len(other.tokens))) // size * size
            least_end = -(-least // size) * size
            if (
                least_end <= end
                and other.position < least_end
                and candidate.tokens[: least_end - first] == other.tokens[: least_end - first]
            ):
                return True
        return False

    def _slots(self, candidate: Sequence) -> int:
        """Continuations that run, or will when their prompt is read, with `candidate` beside them."""
        beams = {s.request.id: s.request.params.beams for s in (*self.running, candidate) if s.request.params.beams > 1}
        return sum(beams.values()) + sum(
            1 + len(s.children) for s in (*self.running, candidate) if s.request.id not in beams
        )

    def _missing(self, sequence: Sequence, end: int) -> int:
        """Blocks that `sequence` lacks to write tokens `computed` .. `end`: new ones, and copies of shared ones."""
        size = self.pool.block_size
        have = sequence.blocks[sequence.position // size :]
        shared = sum(self.pool.references(block) > 1 for block in have)
        return shared + max(0, blocks_of(sequence.first + end, size) - len(sequence.blocks))

    def _reserve(self, plan: StepPlan, sequence: Sequence, end: int) -> bool:
        """Give `sequence` blocks of its own for tokens `computed` .. `end`, from the newest ones when none are left.

        False when it was the newest itself and has been preempted.
        """
        while self._missing(sequence, end) > self.pool.available:
            victim = next(s for s in reversed(self.running) if s.blocks or s is sequence)
            self._preempt(plan, victim)
            if victim is sequence:
                return False
        size = self.pool.block_size
        for i in range(sequence.position // size, len(sequence.blocks)):
            block = sequence.blocks[i]
            if self.pool.references(block) > 1:
                (own,) = self.pool.allocate(1)
                plan.copies.append((block, own))
                self.pool.free([block])
                sequence.blocks[i] = own
            else:
                self.pool.forget(block)
        sequence.blocks += self.pool.allocate(max(0, blocks_of(sequence.first + end, size) - len(sequence.blocks)))
        return True

    def _preempt(self, plan: StepPlan, victim: Sequence) -> None:
        """Take every block of `victim` back; it waits, before all that never ran, and is computed again."""
        plan.rows = [chunk for chunk in plan.rows if chunk.sequence is not victim]
        self._release(victim)
        victim.computed = 0
        victim.preemptions += 1
        self.running.remove(victim)
        self._wait(victim)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = "waiting"
        insort(self.waiting, sequence, key=_order)

    def _release(self, sequence: Sequence) -> None:
        # A new list: chunks of a plan keep the old one.
        blocks, sequence.blocks, sequence.digests, sequence.drafts = sequence.blocks, [], [], ()
        self.pool.free(blocks)

    def _inherit(self, child: Sequence, parent: Sequence, computed: int) -> None:
        """`child` runs beside `parent`, with its first `computed` tokens in the same blocks."""
        size = self.pool.block_size
        child.computed = computed
        child.blocks = parent.blocks[: blocks_of(child.position, size)]
        child.digests = parent.digests[: child.position // size]
        self.pool.share(child.blocks)
        child.status = "running"
        insort(self.running, child, key=_order)

    def _commit(self, chunk: Chunk, new: list[int]) -> Progress:
        sequence, prompt = chunk.sequence, len(chunk.sequence.request.prompt)
        assert bool(new) == chunk.sample, f"{len(new)} tokens were sampled for {chunk}"
        assert sequence.computed == chunk.start, f"{chunk} is committed twice, or not of the last plan"
        assert tuple(new[:-1]) == chunk.drafts[: len(new) - 1], f"{new} does not begin with drafts of {chunk}"
        end = chunk.start + chunk.count - len(chunk.drafts)
        sequence.computed = end
        if _scores(sequence):
            sequence.scored = max(sequence.scored, min(end, prompt))
        self._seal(sequence)
        if sequence.children and end >= prompt:
            # They compute the last prompt token again, each for itself, and get their own first logits that way.
            for child in sequence.children:
                child.cached_tokens, child.scored = prompt - 1, sequence.scored
                self._inherit(child, sequence, prompt - 1)
            sequence.children = []
        kept: list[int] = []
        finish = None
        for token in new:
            kept.append(token)
            sequence.tokens.append(token)
            finish = sequence.ending()
            if finish is not None:
                break
        if kept:
            sequence.computed = end + len(kept) - 1
            self._seal(sequence)
        if finish is not None:
            self.finish(sequence, finish)
        return Progress(sequence, kept, finish)

    def _seal(self, sequence: Sequence) -> None:
        """Make the blocks that have become full known."""
        size, request = self.pool.block_size, sequence.request
        for i in range(len(sequence.digests), sequence.position // size):
            tokens = sequence.ids(i * size, (i + 1) * size)
            sequence.digests.append(
                self.pool.seal(sequence.blocks[i], sequence.digests, tokens, salt=request.salt, adapter=request.adapter)
            )


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _goes_on(chunk: Chunk) -> bool:
    """Whether one position of the same sequence follows, as far as that is known before its token."""
    plain = chunk.sample and not chunk.drafts and not chunk.sequence.children
    return plain and chunk.sequence.request.params.beams == 1


def _scores(sequence: Sequence) -> bool:
    """Whether logits of prompt positions are still wanted."""
    return sequence.request.params.prompt_logprobs is not None and sequence.scored < len(sequence.request.prompt)
