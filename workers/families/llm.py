"""Language models: own prefill and decode loop over a cache that policies may change.

The library's ``generate`` is silently wrong with an evicted cache, so positions are explicit here
and the cache is :class:`~workers.mechanisms.cache.StudioCache`.

Shapes: B batch, L padded prompt length, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from studio_state.errors import WorkloadError
from workers.families.base import RunTrace, StepResult
from workers.families.batches import Batch, State, at_origin, make_batch
from workers.families.cache_frames import frames_of, heads_of, is_moment, is_whole
from workers.families.comparing import distance, kept_shares
from workers.families.parts import language_parts
from workers.families.text import Streamer, encode_item
from workers.mechanisms.attention import Forward, forwarding, of_steps
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.chunk_end import ending_chunk
from workers.mechanisms.expert_load import counting_experts
from workers.mechanisms.sampling import Sampler
from workers.mechanisms.state_layer import advance, cache_for, state_arguments
from workers.session import Session
from workers.workloads.base import Item, ItemResult

WARMUP_TOKENS = (32, 8)  # prompt and new tokens of a warm-up run
SCORE_CHUNK = 16  # tokens a forward when scoring a given continuation; the same in every lane


class LanguageFamily:
    """Adapter for decoder-only language models of the library."""

    id = "llm"

    def parts(self, model: nn.Module) -> dict[str, list[str]]:
        """Names of decoder layers, their attentions, and all linear modules (the output head last)."""
        return language_parts(model, model)

    def backbone(self, model: Any) -> Any:
        """The language model without its output head: embedding, layers, final norm."""
        return model.get_submodule(model.base_model_prefix)

    def warm_up_item(self, session: Session, like: Item) -> Item:
        """What to warm up on: a short prompt of made-up tokens."""
        prompt, new = WARMUP_TOKENS
        vocabulary = max(2, session.info.vocab or 2)
        ids = tuple((7 * i + 11) % vocabulary for i in range(prompt))
        return Item(id="warmup", prompt_ids=ids, max_new_tokens=new, ignore_eos=True)

    def probe(self, session: Session, item: Item) -> RunTrace:
        """A few distributions, to be looked at before anything is timed."""
        given = self.begin(session, [item])
        given.results[0].token_ids = given.results[0].prompt_ids[: item.max_new_tokens]
        return self.follow(session, given.items, given)

    def embedded(self, session: Session, batch: Batch) -> Batch:
        """The batch as the language model reads it; families that see put their images in here."""
        return batch

    # -- forwards --------------------------------------------------------------------------
    def prefill(self, session: Session, batch: Batch) -> State:
        """Pass the prompt through the model, in chunks where asked, and let the policies act at its end."""
        batch = self.embedded(session, batch)
        for shorten in session.prompt_filters:
            batch = shorten(batch)
        cache = cache_for(session)
        logits, forward = self.read(session, batch, cache)
        for hook in (*session.after_prefill, *session.storage):
            hook(cache, forward)
        nexts = torch.tensor(batch.lengths, device=batch.ids.device)[:, None]
        self.settle(session, forward)
        return State(cache, nexts, logits, batch.lengths, batch.padded, batch.rotary_shift, batch.origin)

    def read(self, session: Session, batch: Batch, cache: StudioCache) -> tuple[Tensor, Forward]:
        """All tokens of a batch through the model, into an empty cache: logits [B, V] behind the last ones, the last forward.

        Raises:
            WorkloadError: the prompts are empty.
        """
        length = batch.ids.shape[1]
        chunk = session.spec.chunk_size or length
        logits = None
        for start in range(0, length, chunk):
            session.check_cancelled()
            stop = min(start + chunk, length)
            forward = Forward(
                cache=cache,
                phase="prefill",
                positions=batch.positions[:, start:stop],
                padded=batch.padded,
                ends_prefill=stop == length,
                prompt_lengths=batch.lengths,
                kernel=session.spec.attention,
                observers=session.observers,
                retain_queries=session.retain_queries,
                retain_on=session.retain_on,
                attending=session.attending,
                image_tokens=None if batch.image_tokens is None else batch.image_tokens[:, start:stop],
                ids=batch.ids[:, start:stop],
                before=logits,
                seen=stop,
            )
            embeds = None if batch.embeds is None else batch.embeds[:, start:stop]
            rotary = None if batch.rotary is None else batch.rotary[:, :, start:stop]
            with ending_chunk(session, forward):
                logits = self.library_forward(session, batch.ids[:, start:stop], forward, True, embeds, rotary)[:, -1]
        if logits is None:
            raise WorkloadError("the prompt holds no token; give at least one character")
        forward.logits = logits[:, None]
        return logits, forward

    def settle(self, session: Session, forward: Forward) -> None:
        """Called at the end of a prefill, for families that keep a record of it."""

    def library_forward(
        self,
        session: Session,
        ids: Tensor,
        forward: Forward,
        last_only: bool = False,
        embeds: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> Tensor:
        """The library's own modules on ids [B, T] or, in their place, embeds [B, T, D]: logits [B, T or 1, V].

        Args:
            rotary: [3, B, T] positions for rotary embeddings, where they are not the plain ones.
        """
        positions = forward.positions.clamp_min(0) if rotary is None else rotary
        given: dict[str, Any] = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
        if "ssm" in session.info.traits:
            given |= state_arguments(session.model, forward)
        else:
            given |= {"position_ids": positions, "past_key_values": forward.cache}
        with forwarding(forward):
            out = session.model(**given, use_cache=True, logits_to_keep=1 if last_only else 0)
        advance(forward.cache, forward.seen)
        return out.logits

    def step(self, session: Session, state: State, ids: Tensor) -> Tensor:
        """The decode path on the next tokens ids [B, T]: logits [B, T, V]. Advances the state."""
        session.check_cancelled()
        t = ids.shape[1]
        positions = state.next_position if t == 1 else state.next_position + torch.arange(t, device=ids.device)
        forward = Forward(
            cache=state.cache,
            phase="decode",
            positions=positions,
            padded=state.padded,
            prompt_lengths=state.lengths,
            kernel=session.spec.attention,
            observers=of_steps(session.observers),
            reading=session.reading,
            attending=session.attending,
            retain_queries=session.retain_queries if session.retain_on else 0,
            retain_on=session.retain_on,
            ids=ids,
            before=state.logits,
            seen=state.cache.seen + t,
        )
        if session.step_forward:
            logits = session.step_forward(ids, forward)
        else:
            shift = state.rotary_shift
            rotary = None if shift is None else (positions + shift).expand(3, -1, -1)
            logits = self.library_forward(session, ids, forward, rotary=rotary)
        state.next_position = state.next_position + t
        state.logits, forward.logits = logits[:, -1], logits
        session.count("forward_passes", 1)
        for hook in session.after_step:
            hook(state.cache, forward)
        return logits

    # -- runs ------------------------------------------------------------------------------
    def begin(self, session: Session, items: Sequence[Item]) -> RunTrace:
        """Encode the prompts; nothing runs yet.

        Raises:
            WorkloadError: a prompt is empty, or longer than the model's context.
        """
        trace = RunTrace(items=items, results=[ItemResult(item=i) for i in items])
        for item in items:
            prompt, ids, image = self.encode(session, item)
            new = max(
                (len(c) for c in item.continuation_ids), default=self._new_tokens(session, item) if item.task == "generate" else 0
            )
            if session.info.context and len(ids) + new > session.info.context:
                raise WorkloadError(
                    f"item {item.id}: {len(ids)} prompt tokens and {new} new ones exceed the context of "
                    f"{session.info.context} tokens of {session.info.name}; shorten the prompt or ask for fewer new tokens"
                )
            trace.prompts.append(prompt)
            trace.pieces.append([session.processor.decode([t]) for t in ids])
            trace.results[len(trace.prompts) - 1].prompt_ids = ids
            trace.images.append(image)
        return trace

    def encode(self, session: Session, item: Item) -> tuple[str, list[int], Any]:
        """The prompt as text, as token ids, and its image as the model takes it (None: there is none)."""
        return *encode_item(session, item), None

    def images_of(self, session: Session, items: Sequence[Item]) -> Sequence[Any]:
        """The images of these items as the model takes them; none for models that do not see."""
        return ()

    def _new_tokens(self, session: Session, item: Item) -> int:
        return session.spec.max_new_tokens or item.max_new_tokens

    @torch.inference_mode()
    def run(self, session: Session, trace: RunTrace) -> Iterator[StepResult]:
        """Prefill, then decode or score by the decode path. Work of the caller between steps is not timed."""
        session.counts.clear()
        batch = self._batch(session, trace.results, trace.images)
        with counting_experts(session, len(trace.items)) as experts:
            start = session.clock()
            state = self.prefill(session, batch)
            task = trace.items[0].task
            if task == "generate":
                yield from self._generate(session, trace, state, start)
            else:
                self._note_prefill(trace, session, state, session.clock() - start)
                yield trace.steps[-1]
                yield from self._score(session, trace, state)
        trace.experts = experts.tables()
        trace.counts.update(experts.metrics())
        trace.counts.update(session.counts)
        trace.counts["kv_bytes"] = state.cache.nbytes() + session.counts.get("kv_bytes", 0.0)  # and of caches beside it
        trace.counts["cached_tokens"] = state.cache.stored()

    def _batch(self, session: Session, results: Sequence[ItemResult], images: Sequence[Any]) -> Batch:
        pad = session.processor.pad_token_id
        batch = make_batch([r.prompt_ids for r in results], pad if pad is not None else 0, session.device)
        batch.images = images
        return batch

    def _note_prefill(
        self, trace: RunTrace, session: Session, state: State, seconds: float, new: list[list[int]] | None = None
    ) -> None:
        trace.steps.append(StepResult("prefill", seconds, new or [], [""] * len(trace.items)))
        trace.counts["prefill_kv_bytes"] = float(state.cache.nbytes())
        trace.counts["kept_prompt_tokens"] = state.cache.stored()
        trace.kept = kept_shares(state.cache, state.lengths)
        self._look(trace, state, 1)
        if state.origin:
            trace.kept = [
                [at_origin(layer, origin, len(result.prompt_ids)) for layer in layers]
                for layers, origin, result in zip(trace.kept, state.origin, trace.results, strict=True)
            ]

    def _look(self, trace: RunTrace, state: State, new: int) -> None:
        """Remember what every head holds, once something was evicted."""
        if is_whole(state):
            return
        frames = frames_of(state, [len(r.prompt_ids) for r in trace.results], new)
        trace.heads, trace.frames = heads_of(state), trace.frames or [[] for _ in frames]
        for row, frame in zip(trace.frames, frames, strict=False):
            row.append(frame)

    def _generate(self, session: Session, trace: RunTrace, state: State, start: float) -> Iterator[StepResult]:
        sampler = Sampler(session.spec.sampling, session.spec.seed, session.device)
        limit = max(self._new_tokens(session, i) for i in trace.items)
        stop = set() if session.spec.eos == "ignore" or trace.items[0].ignore_eos else end_tokens(session)
        streams = [Streamer(session.processor) for _ in trace.items]
        done = [False] * len(trace.items)
        first = sampler.draw(state.logits)
        seconds = session.clock() - start
        new = [[int(t)] for t in first]
        self._note_prefill(trace, session, state, seconds, new)
        step = trace.steps[0]
        start = session.clock()
        for hook in session.before_decode:  # after the count: room that they reserve is not of the prefill
            hook(state.cache, limit)
        step.seconds += session.clock() - start
        decoder = (session.decoder or one_token_a_step)(session, Generation(self, trace, state, sampler, first, limit))
        while True:
            step.new = [self._accept(trace, row, ids, stop, done, limit) for row, ids in enumerate(step.new)]
            step.text = [streams[row].put(ids, done[row]) for row, ids in enumerate(step.new)]
            for row, text in enumerate(step.text):
                trace.results[row].text += text
            told = max(len(r.token_ids) for r in trace.results)
            yield step
            if all(done):
                self._look(trace, state, told)
                return
            if told < limit and is_moment(told, limit):
                self._look(trace, state, told)
            start = session.clock()
            new = next(decoder)
            step = StepResult("step", session.clock() - start, new)
            trace.steps.append(step)

    def _accept(self, trace: RunTrace, row: int, ids: list[int], stop: set[int], done: list[bool], limit: int) -> list[int]:
        """The ids that count: none after the end token, none over the limit."""
        result, taken = trace.results[row].token_ids, []
        for t in ids:
            if done[row]:
                break
            taken.append(t)
            result.append(t)
            done[row] = t in stop or len(result) >= limit
        return taken

    def _score(self, session: Session, trace: RunTrace, state: State) -> Iterator[StepResult]:
        """Negative log-likelihood of every continuation, each from the same prefilled context."""
        item, result = trace.items[0], trace.results[0]
        several = len(item.continuation_ids) > 1
        for ids in item.continuation_ids:
            start = session.clock()
            branch = replace(state, cache=state.cache.clone()) if several else state
            logprobs = self.force(session, branch, list(ids))
            nll = -logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0]
            result.nll.append(nll.tolist())
            trace.logits.append(logprobs)
            step = StepResult("step", session.clock() - start, [list(ids)], [""])
            trace.steps.append(step)
            yield step

    def force(self, session: Session, state: State, ids: list[int]) -> Tensor:
        """Log-probabilities [n, V] (float32) before each of the given next tokens, by the decode path in chunks."""
        rows = [state.logits.float()]
        for start in range(0, len(ids) - 1, SCORE_CHUNK):
            chunk = torch.tensor([ids[start : min(start + SCORE_CHUNK, len(ids) - 1)]], device=session.device)
            rows.append(self.step(session, state, chunk)[0].float())
        return torch.cat(rows).log_softmax(-1)

    # -- quality ---------------------------------------------------------------------------
    @torch.inference_mode()
    def follow(self, session: Session, items: Sequence[Item], reference: RunTrace) -> RunTrace:
        """Teacher-forced on the reference's tokens, row by row, untimed."""
        trace = RunTrace(items=items, results=[ItemResult(item=i) for i in items])
        for row, result in enumerate(reference.results):
            batch = self._batch(session, [result], self.images_of(session, items[row : row + 1]))
            state = self.prefill(session, batch)
            for hook in session.before_decode:
                hook(state.cache, len(result.token_ids))
            trace.logits.append(self.force(session, state, result.token_ids))
        return trace

    def compare(self, reference: RunTrace, lane: RunTrace) -> list[dict[str, float]]:
        """KL divergence and top-1 agreement of the distributions (all continuations of a row together)."""
        if reference.items[0].task != "generate":
            return [distance(torch.cat(reference.logits), torch.cat(lane.logits))]
        return [distance(a, b) for a, b in zip(reference.logits, lane.logits, strict=True)]


@dataclass
class Generation:
    """What a decoder needs: the state, the sampler, the first token already drawn [B], the limit."""

    family: LanguageFamily
    trace: RunTrace
    state: State
    sampler: Sampler
    first: Tensor
    limit: int


def one_token_a_step(session: Session, run: Generation) -> Iterator[list[list[int]]]:
    """The plain decode loop: one forward, one token a row."""
    ids = run.first
    while True:
        logits = run.family.step(session, run.state, ids[:, None])
        ids = run.sampler.draw(logits[:, -1])
        yield [[t] for t in ids.tolist()]


def end_tokens(session: Session) -> set[int]:
    """Ids that end a text: the generation config's and the tokenizer's."""
    config = getattr(session.model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    found = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return {int(i) for i in found | {session.processor.eos_token_id} if i is not None}
