"""The queue and the batches: one thread that generates for all clients, a pass at a time."""

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_lm.build import LoadedModel
from diffusion_lm.inference import by_name
from diffusion_lm.inference.pipeline import Request, encode_infill, few_widths
from diffusion_lm.inference.published import Preset
from diffusion_lm.inference.runner import Snapshot
from diffusion_lm.inference.streaming import Answer, Rows
from diffusion_lm.samplers.base import TextSampler
from diffusion_lm.samplers.sampling_params import RowSampling, SamplingParams, sampling_of
from diffusion_lm.serving.ask import Ask, RequestError, known_samplers

log = logging.getLogger(__name__)
_SAME, _ALL = 2, 4  # batches at a time: of one kind of request, and in all
_KEPT = 64  # samplers whose programs are kept


class QueueFull(Exception):
    """As many requests wait as may."""


class Event(NamedTuple):
    """A text after a pass: its number, what is new, how many tokens it has, why it ended (None: it doesn't), and what
    is written."""

    text: int
    piece: str
    num_tokens: int
    finish_reason: str | None
    written: Snapshot


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the queue or in a batch.

    send     called by the engine's thread: an `Event` where there is something to show, an Exception, or None when all
             texts are complete
    sampler  what generates
    answers  the request's texts, the n texts of a prompt after one another
    written  of each text, what its last pass wrote
    canvas   tokens of a canvas; 0: the sampler has none
    """

    ask: Ask
    kind: tuple
    sampler: TextSampler
    send: Callable[[Any], None]
    ids: list[np.ndarray]
    answers: list[Answer]
    written: list[Snapshot | None]
    canvas: int
    cancelled: bool = False


@dataclasses.dataclass(eq=False)
class _Batch:
    rows: Rows
    members: list[tuple[Ticket, int]]  # of each row: the ticket, and which of its texts
    kind: tuple


class Engine:
    """Generates for many clients with one model.

    Requests with the same sampler, steps, top_k and cfg_scale (and, of canvases, max_tokens) that wait together are
    one batch, of at most `max_rows` rows. Texts that end, and clients that leave, are out of it at their next token or
    after the canvas at hand. A request that comes later waits for its turn in one of two batches of its kind, which
    take turns.

    max_waiting  requests in the queue, at most
    """

    def __init__(self, model: LoadedModel, *, max_rows: int, max_waiting: int):
        self.model, self.max_rows, self.max_waiting = model, max_rows, max_waiting
        self.samplers = known_samplers(model)
        self._made: dict[tuple, Preset] = {}
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Batch] = []
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, send: Callable[[Any], None]) -> Ticket:
        """Puts a request into the queue. Raises QueueFull, or RequestError for a sampler that doesn't fit."""
        ask = dataclasses.replace(ask, sampler=(ask.sampler[0] or self.samplers[0], *ask.sampler[1:]))
        (sampler, *_, cfg_scale), tokenizer = self._sampler(ask), self.model.tokenizer
        so_drawn = sampler
        if ask.sampler[0] == by_name.PUBLISHED:  # its settings may depend on those that are given
            so_drawn = by_name.made_for(self.model, by_name.PUBLISHED, ask.draw).sampler
        own = sampling_of(so_drawn) or SamplingParams()
        draw = {name: getattr(own, name) for name in ("temperature", "top_k", "top_p", "min_p")} | ask.draw
        ask = dataclasses.replace(ask, draw=draw, cfg_scale=cfg_scale if ask.cfg_scale is None else ask.cfg_scale)
        ids = [prompt for prompt in ask.prompts for _ in range(ask.n)]
        if ask.infill:
            if ask.cfg_scale:
                raise RequestError(f"suffix goes without cfg_scale={ask.cfg_scale:g}: set it to 0", param="cfg_scale")
            try:
                ids, *_ = encode_infill(self.model, sampler, [ask.infill])
            except ValueError as error:
                raise RequestError(str(error), param="suffix") from None
        canvas = getattr(sampler, "canvas_length", 0)
        length = ask.max_tokens if canvas else few_widths(ask.max_tokens, self.model.config.data.seq_len)
        apart = object() if ask.infill else None  # holes have a batch of their own
        kind = (ask.sampler, draw["top_k"], ask.cfg_scale, length, apart)
        answers = [Answer(tokenizer, prompt, ask.max_tokens, ask.stop) for prompt in ids]
        ticket = Ticket(ask, kind, sampler, send, ids, answers, [None] * len(ids), canvas)
        with self._changed:
            if self._closed or len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests are waiting, as many as may: try again in a moment")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """The client is gone, or has all that it wants."""
        ticket.cancelled = True

    def load(self) -> dict[str, int]:
        """How many requests wait, and how many rows run."""
        with self._changed:
            members = [member for batch in self._running for member in batch.members]
            running = sum(not ticket.cancelled and not ticket.answers[i].finish_reason for ticket, i in members)
            return {"waiting": len(self._waiting), "running": running}

    def close(self) -> None:
        """Ends the thread; what still runs is told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _sampler(self, ask: Ask) -> Preset:
        name, steps, canvas_length = ask.sampler
        if name not in self.samplers:
            raise RequestError(f"sampler {name[:40]!a} is none of {', '.join(self.samplers)}", param="sampler")
        top_k = ask.draw.get("top_k", None if name == by_name.PUBLISHED else 0)
        if (key := (ask.sampler, top_k)) not in self._made:
            try:
                shape = {"denoising_steps": steps, "canvas_length": canvas_length}
                made = by_name.made_for(self.model, name, {"top_k": top_k}, **shape)
            except ValueError as error:
                raise RequestError(str(error), param="sampler") from None
            if len(self._made) >= _KEPT:
                self._made.pop(next(iter(self._made)))
            self._made[key] = made
        return self._made[key]

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
                if self._closed:
                    left = [*self._waiting, *(ticket for batch in self._running for ticket, _ in batch.members)]
                    for ticket in dict.fromkeys(left):
                        self._send(ticket, ConnectionAbortedError("the server was shut down"))
                    return
                together = self._next()
            self._guarded(together, lambda together=together: self._start(together), asked_wrong=True)
            for batch in list(self._running):
                members = list(dict.fromkeys(ticket for ticket, _ in batch.members))
                if not self._guarded(members, lambda batch=batch: self._advance(batch)):
                    self._running.remove(batch)

    def _next(self) -> list[Ticket]:
        """Requests of one kind that begin now."""
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)
        kinds = [batch.kind for batch in self._running]
        first = next((t for t in self._waiting if kinds.count(t.kind) < _SAME), None)
        if first is None or len(kinds) >= _ALL:
            return []
        together, rows = [], 0
        for ticket in self._waiting:
            if ticket.kind == first.kind and (not together or rows + len(ticket.ids) <= self.max_rows):
                together.append(ticket)
                rows += len(ticket.ids)
        self._waiting = deque(ticket for ticket in self._waiting if ticket not in together)
        return together

    def _guarded(self, tickets: list[Ticket], act: Callable[[], Any], asked_wrong: bool = False) -> Any:
        """What `act` returns; None after an error, which the tickets are sent (asked_wrong: as one of theirs)."""
        try:
            return act()
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("a batch of %d requests failed", len(tickets))
            theirs = asked_wrong and isinstance(error, ValueError)
            for ticket in tickets:
                self._send(ticket, RequestError(str(error)) if theirs else error)
            return None

    def _start(self, tickets: list[Ticket]) -> None:
        if not tickets:
            return
        ask = tickets[0].ask
        request = Request(model=self.model, sampler=tickets[0].sampler, cfg_scale=ask.cfg_scale)
        members = [(ticket, i) for ticket in tickets for i in range(len(ticket.ids))]
        ids = [ticket.ids[i] for ticket, i in members]
        # a text's key is that of its number among the n texts of its prompt
        keys = _keys(np.uint32([t.ask.seed for t, _ in members]), np.int32([i % t.ask.n for t, i in members]))
        draws = [[ticket.ask.draw[name] for ticket, _ in members] for name in ("temperature", "top_p", "min_p")]
        rest = SamplingParams(top_k=tickets[0].kind[1], suppressed=self.model.tokenizer.suppressed)
        more, length = {"sampling": RowSampling(*map(np.float32, draws), rest=rest)}, tickets[0].kind[3]
        if ask.infill:
            _, lengths, suffix = encode_infill(self.model, request.sampler, [ask.infill])
            more, length = more | {"suffix": suffix, "num_new_tokens": lengths}, suffix.shape[1]
        self._running.append(_Batch(Rows(request, ids, keys, max_new_tokens=length, **more), members, tickets[0].kind))

    def _advance(self, batch: _Batch) -> bool:
        """One pass; whether there are more."""
        snapshot = next(iter(batch.rows), None)
        open_texts = 0
        for row, (ticket, i) in enumerate(batch.members):
            answer = ticket.answers[i]
            if answer.finish_reason or ticket.cancelled:
                batch.rows.leave(row)
                continue
            if snapshot is None:
                raise RuntimeError("a batch ended before its texts")
            piece = answer.update(snapshot.tokens[row, : snapshot.length[row]], bool(snapshot.finished[row]))
            if answer.finish_reason:
                batch.rows.leave(row)
            open_texts += not answer.finish_reason
            ticket.written[i] = written = Snapshot(
                *(None if a is None else a[row] for a in snapshot[:-1]), snapshot.nfe
            )
            if ticket.ask.passes or (ticket.ask.stream and (piece or answer.finish_reason)):
                self._send(ticket, Event(i, piece, len(answer.ids), answer.finish_reason, written))
            if all(answer.finish_reason for answer in ticket.answers):
                self._send(ticket, None)
        return open_texts > 0

    def _send(self, ticket: Ticket, event: Any) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.send(event)
        except RuntimeError:  # nobody listens any more: the server's loop has ended
            ticket.cancelled = True


@jax.jit
def _keys(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    """`pipeline.row_keys`, of rows with seeds of their own."""
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)


def warm_up(engine: Engine) -> None:
    """Compiles what the first client would wait for: a short text by the sampler that fits the model."""
    done, context = threading.Event(), engine.model.config.data.seq_len
    bos = np.array([engine.model.tokenizer.bos], np.int32)
    ask = Ask(
        chat=False, prompts=(bos,), infill=None, max_tokens=min(16, context - 1), n=1, seed=0, stop=(),
        sampler=("", None, 0),
    )  # fmt: skip
    engine.submit(ask, lambda event: done.set() if event is None or isinstance(event, Exception) else None)
    done.wait()
