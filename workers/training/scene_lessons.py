"""Teaching a vision-language model the synthetic world: shared by the recipes of the two scene models.

The questions of one scene stand behind its image in one sequence, and each sees the image and
itself only (block mask, positions counted from the image's end): eight answers for one image.

Shapes: B scenes, I image tokens, S sequence, P patches of a view (12 x 12).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from workers.data.scenes import GRID, KINDS, NAMES, NOTHING, RELATIONS, Question, QuestionKind, Scene, ask, make_scene

PATCH, VIEW = 8, 96
COVERED = 0.2  # share of a patch that an object must cover to name it
VISIBLE = 0.3  # share of an object that must be in a view to count there
BLIND = 0.06  # share of questions asked without the image, so that the model also knows how to answer blind
EXTRA = ("colour-at", "exists", "relation")  # the hardest kinds are asked twice, in turn
MORE: tuple[QuestionKind, ...] = ("relation", "relation", "exists", "exists")
COMPARED = 5  # relations asked for in the last lesson, beside one question of each kind
CAPTION = "what is there ?"
PLACED_LAYER = 2  # layers of the language model after which a name knows its object's place
BEARING_LAYER = 3  # ... and after which the second of two names knows where the first stands from there
BEARINGS = 9
ABSENT = GRID * GRID  # the place of a name that nothing has
COUNTED: tuple[QuestionKind, ...] = ("count", "count", "count", "count-of-shape", "count-of-shape", "shape-at")
Lesson = Literal["describe", "relate", "compare", "count"]
IGNORED = -100


@dataclass
class AskedBatch:
    """Scenes with their questions, ready for the language model.

    Attributes:
        ids: [B, S]; the first I + 2 are ``<s> user <image> ...``.
        positions: [B, S]; mask: [B, 1, S, S] additive; targets: [B, S], IGNORED off the answers.
        of_caption: [B, S] which targets belong to the caption.
        places: [B, S] for the last word of each object's name in a question the cell it stands in, ABSENT if nothing has
            this name; IGNORED elsewhere, for names that several have, and where the image is hidden.
        bearings: [B, S] for the last word of the second of two names where the first stands from there, of nine
            (left, same column, right) x (above, same row, below); IGNORED elsewhere.
        relations: [B, S] where the answer to such a question begins, 9 x the relation asked for + that bearing; IGNORED elsewhere.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    of_caption: Tensor
    places: Tensor
    bearings: Tensor
    relations: Tensor


def questions_of(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each kind, and two more of the hardest kinds."""
    extra = [EXTRA[i] for i in rng.permutation(len(EXTRA))[:2]]
    return [ask(scene, kind, rng) for kind in (*KINDS, *extra)]  # type: ignore[arg-type]


def pairs_of(scene: Scene, lesson: Lesson, rng: np.random.Generator) -> list[tuple[str, str]]:
    """What is asked about a scene, and the answers; the last of ``describe`` is its caption.

    Describing binds shape, colour and place of every object in a few dozen words, where a question asks for one.
    Relations need the places of two objects by name: ``relate`` asks for the places of some objects and of one that is
    not there, and for the hard kinds again; ``compare`` asks for many relations; ``count`` for what is many times in view
    where a scene is seen as a whole and in tiles.
    """
    if lesson == "describe":
        pairs = [(q.text, q.answer) for q in questions_of(scene, rng)]
        return [*pairs, (CAPTION, scene.caption.replace(",", " ,"))]
    if lesson in ("compare", "count"):
        kinds: tuple[QuestionKind, ...] = (*KINDS, *(COUNTED if lesson == "count" else ["relation"] * COMPARED))  # type: ignore[assignment]
        return [(q.text, q.answer) for q in (ask(scene, kind, rng) for kind in kinds)]
    questions = [ask(scene, kind, rng) for kind in (*KINDS, *MORE)]
    names = Counter(t.name for t in scene.things)
    alone = [t for t in scene.things if names[t.name] == 1]
    places = [(alone[i].name, alone[i].place) for i in rng.permutation(len(alone))[:3]]
    places.append((str(rng.choice([n for n in NAMES if n not in names])), NOTHING))
    return [*((q.text, q.answer) for q in questions), *((f"the {name} is at the ?", where) for name, where in places)]


def asked(
    tokenizer: Any,
    image_token: int,
    image_tokens: int,
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    lesson: Lesson = "describe",
    gap: int = 0,
) -> AskedBatch:
    """Put what is asked about each scene behind its image.

    Args:
        gap: positions left free between image and questions, for further image tokens that a later lesson puts there.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    prefix = [tokenizer.bos_token_id, vocabulary["user"], *[image_token] * image_tokens]
    start = len(prefix)
    bodies = []
    for scene in scenes:
        blocks = []
        for question, answer in pairs_of(scene, lesson, rng):
            words, told = ([vocabulary[w] for w in text.split()] for text in (question, answer))
            blocks.append(([*words, vocabulary["assistant"], *told, tokenizer.eos_token_id], len(words)))
        bodies.append(blocks)
    length = start + max(sum(len(b) for b, _ in blocks) for blocks in bodies)
    ids = np.full((len(scenes), length), tokenizer.pad_token_id)
    positions = np.zeros((len(scenes), length), dtype=np.int64)
    targets = np.full((len(scenes), length), IGNORED)
    block = np.full((len(scenes), length), -2)  # -1 the image's part, -2 padding
    blind = np.zeros((len(scenes), length), dtype=bool)
    of_caption = np.zeros((len(scenes), length), dtype=bool)
    places, bearings, relations = (np.full((len(scenes), length), IGNORED) for _ in range(3))
    ids[:, :start], positions[:, :start], block[:, :start] = prefix, np.arange(start), -1
    for r, blocks in enumerate(bodies):
        at = start
        for n, (tokens, words) in enumerate(blocks):
            end = at + len(tokens)
            ids[r, at:end], block[r, at:end] = tokens, n
            positions[r, at:end] = start + gap + np.arange(len(tokens))
            targets[r, at + words : end - 1] = tokens[words + 1 :]  # the answer and the end, each from the token before
            of_caption[r, at:end] = lesson == "describe" and n == len(blocks) - 1
            blind[r, at:end] = not of_caption[r, at] and rng.random() < BLIND
            if not blind[r, at]:
                found = named(tokens[:words], vocabulary, scenes[r])
                for word, cell in found:
                    places[r, at + word] = cell
                if len(found) == 2 and ABSENT not in (found[0][1], found[1][1]):
                    stands = bearing(found[0][1], found[1][1])
                    bearings[r, at + found[1][0]] = stands
                    asked_for = next(
                        i for i, relation in enumerate(RELATIONS) if vocabulary[relation.split()[0]] in tokens[:words]
                    )
                    relations[r, at + words] = BEARINGS * asked_for + stands
            at = end
    causal = np.tri(length, dtype=bool)[None]
    to_prefix = (block == -1)[:, None, :]
    hidden = to_prefix & (np.arange(length) >= 2)[None, None, :] & blind[:, :, None]
    allowed = causal & ((block[:, :, None] == block[:, None, :]) | to_prefix) & ~hidden
    mask = torch.where(torch.from_numpy(allowed)[:, None], 0.0, torch.finfo(torch.bfloat16).min)
    return AskedBatch(
        *map(torch.from_numpy, (ids, positions)), mask, *map(torch.from_numpy, (targets, of_caption, places, bearings, relations))
    )


def bearing(first: int, second: int) -> int:
    """Where one cell lies from another: 3 x (0 left, 1 same column, 2 right) + (0 above, 1 same row, 2 below)."""
    (row, column), (other_row, other_column) = divmod(first, GRID), divmod(second, GRID)
    return 3 * (1 + int(np.sign(column - other_column))) + 1 + int(np.sign(row - other_row))


def named(tokens: Sequence[int], vocabulary: dict[str, int], scene: Scene) -> list[tuple[int, int]]:
    """(place of the word, cell) of every full name in a question, but for names that several objects have."""
    words = {i: w for w, i in vocabulary.items()}
    text = [words[t] for t in tokens]
    found = []
    for i in range(1, len(text)):
        name = f"{text[i - 1]} {text[i]}"
        if name not in NAMES:
            continue
        cells = [t.cell[0] * GRID + t.cell[1] for t in scene.things if t.name == name]
        if len(cells) <= 1:
            found.append((i, cells[0] if cells else ABSENT))
    return found


class Taught(nn.Module):
    """The model and the heads that teach its vision tower what to see.

    Without the loss on CLS, its attention would carry nothing, and methods that rank image
    tokens by it (HiRED, VisionZip) could not work; the patch loss makes shapes quick to learn.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.patch_head = nn.Linear(width, 1 + len(NAMES))
        self.name_head = nn.Linear(width, len(NAMES))
        self.count_head = nn.Linear(width, 7)

    def seeing_loss(self, hidden: Sequence[Tensor], cls: Tensor, views: Views) -> Tensor:
        """How well the tower names the object under each patch, and CLS all objects of the view.

        Args:
            hidden: the tower's hidden states, each [B, 1 + P, D]; cls: its pooled output [B, D].
        """
        features = hidden[self.model.config.vision_feature_layer][:, 1:]
        patches = nn.functional.cross_entropy(self.patch_head(features).float().flatten(0, 1), views.patches.flatten())
        names = nn.functional.binary_cross_entropy_with_logits(self.name_head(cls).float(), views.names)
        counts = nn.functional.cross_entropy(self.count_head(cls).float(), views.counts)
        return patches + names + 0.3 * counts

    def answering_loss(
        self,
        batch: AskedBatch,
        pixels: Tensor,
        views: Views | None,
        place_head: nn.Module | None = None,
        relation_heads: RelationHeads | None = None,
        **image: Any,
    ) -> Tensor:
        """How well the answers are predicted; plus a tenth of the seeing loss, so that the tower does not forget.

        Args:
            place_head: also teach the language model to know an object's place where it reads its name (hidden state -> cell).
            relation_heads: and how two named objects stand to each other.
        """
        caught: list[Any] = []
        tower = self.model.model.vision_tower
        handle = tower.register_forward_hook(
            lambda module, inputs, output: caught.append((output.hidden_states, output.pooler_output))
        )
        try:
            features = self.model.model.get_image_features(pixel_values=pixels, return_dict=True, **image).pooler_output
        finally:
            handle.remove()
        embedded = self.model.get_input_embeddings()(batch.ids)
        rows = torch.stack(list(features)).to(embedded.dtype)  # [B, I, D]
        embedded = torch.cat([embedded[:, :2], rows, embedded[:, 2 + rows.shape[1] :]], 1)
        read = self.model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            output_hidden_states=place_head is not None,
            output_attentions=place_head is not None and views is not None,
        )
        out = read.last_hidden_state
        told = batch.targets != IGNORED
        each = nn.functional.cross_entropy(self.model.lm_head(out[told]).float(), batch.targets[told], reduction="none")
        of_caption = batch.of_caption[told]
        loss = each[~of_caption].mean() + (each[of_caption].mean() if bool(of_caption.any()) else 0.0)
        if place_head is not None:
            at = batch.places != IGNORED
            loss = loss + nn.functional.cross_entropy(place_head(read.hidden_states[PLACED_LAYER][at]).float(), batch.places[at])
            if views is not None:
                loss = loss + pointing_loss(
                    read.attentions[PLACED_LAYER - 1][:, 0, :, 2 : 2 + rows.shape[1]], batch.places, views
                )
        if relation_heads is not None:
            loss = loss + relation_heads.loss(read.hidden_states, batch)
        return loss if views is None else loss + 0.1 * self.seeing_loss(*caught[0], views)


def pointing_loss(attention: Tensor, places: Tensor, views: Views) -> Tensor:
    """How little of a name's attention lies on the object that it names.

    Without it names find objects by their shape alone, and of two circles the colour no longer decides.

    Args:
        attention: of one head from every word to every patch [B, S, P]; places: as in ``AskedBatch``.
    """
    grid = VIEW // PATCH
    row = torch.arange(grid) * GRID // grid
    cell_of_patch = (row[:, None] * GRID + row).flatten()  # [P]
    at = (places != IGNORED) & (places != ABSENT)
    of_object = (cell_of_patch == places[at][:, None]) & (views.patches > 0)[at.nonzero()[:, 0]]  # [names, P]
    return -(attention[at].float() * of_object).sum(-1).clamp_min(1e-6).log().mean()


class RelationHeads(nn.Module):
    """What must be known to answer how two objects stand to each other, each where it is needed.

    Whether "left of" holds depends on the relation and the bearing together and on neither alone, so the answer by
    itself teaches neither: without these, left and right stay at chance for ten thousand steps.
    """

    def __init__(self, width: int):
        super().__init__()
        self.second_name = nn.Linear(width, BEARINGS)
        self.asked_relation = nn.Linear(width, len(RELATIONS))
        self.answer_bearing = nn.Linear(width, BEARINGS)

    def loss(self, hidden: Sequence[Tensor], batch: AskedBatch) -> Tensor:
        """Bearing at the second name, the relation asked for and the bearing where the answer begins; of fewer layers the last."""
        late, last = hidden[: BEARING_LAYER + 1][-1], hidden[-1]
        names, answers = batch.bearings != IGNORED, batch.relations != IGNORED
        relation, stands = batch.relations[answers] // BEARINGS, batch.relations[answers] % BEARINGS
        return (
            nn.functional.cross_entropy(self.second_name(late[names]).float(), batch.bearings[names])
            + nn.functional.cross_entropy(self.asked_relation(late[answers]).float(), relation)
            + nn.functional.cross_entropy(self.answer_bearing(last[answers]).float(), stands)
        )


class Placed(nn.Module):
    """A taught model with the heads that read places off names, and relations off pairs of names."""

    def __init__(self, taught: Taught):
        super().__init__()
        self.taught = taught
        width = taught.model.config.text_config.hidden_size
        self.place_head = nn.Linear(width, ABSENT + 1)
        self.relation_heads = RelationHeads(width)


@dataclass
class Views:
    """What the tower should see in each view [B]: patches [B, P] (0 = ground), names [B, 20], counts [B]."""

    images: NDArray[np.uint8]  # [B, 96, 96, 3]
    patches: Tensor
    names: Tensor
    counts: Tensor


def views_of(scenes: Sequence[tuple[Scene, NDArray[np.uint8], NDArray[np.bool_]]]) -> Views:
    """Labels of views (scene, image [96, 96, 3], masks [objects, 96, 96])."""
    grid = VIEW // PATCH
    patches = np.zeros((len(scenes), grid, grid), dtype=np.int64)
    names = np.zeros((len(scenes), len(NAMES)), dtype=np.float32)
    counts = np.zeros(len(scenes), dtype=np.int64)
    for i, (scene, _, masks) in enumerate(scenes):
        cover = masks.reshape(len(masks), grid, PATCH, grid, PATCH).mean((2, 4))
        full = masks.sum((1, 2))
        for thing, share, area in zip(scene.things, cover, full, strict=True):
            patches[i][share >= COVERED] = 1 + NAMES.index(thing.name)
            extent = area / (thing.radius**2 * 1.5)
            if extent >= VISIBLE:
                names[i, NAMES.index(thing.name)] = 1
                counts[i] += 1
    images = np.stack([image for _, image, _ in scenes])
    return Views(images, torch.from_numpy(patches.reshape(len(scenes), -1)), torch.from_numpy(names), torch.from_numpy(counts))


def whole(scene: Scene) -> tuple[Scene, NDArray[np.uint8], NDArray[np.bool_]]:
    """The view of a whole 96-pixel scene."""
    return scene, np.asarray(scene.image), scene.masks


def halved(scene: Scene) -> tuple[Scene, NDArray[np.uint8], NDArray[np.bool_]]:
    """The view of a whole 192-pixel scene, half as large."""
    image = np.asarray(scene.image.resize((VIEW, VIEW), Image.Resampling.BICUBIC))
    masks = scene.masks.reshape(-1, VIEW, 2, VIEW, 2).mean((2, 4)) >= 0.5
    things = tuple(replace(t, at=(t.at[0] / 2, t.at[1] / 2), radius=t.radius / 2) for t in scene.things)
    return replace(scene, things=things, size=VIEW), image, masks


def tile(scene: Scene, x: int, y: int) -> tuple[Scene, NDArray[np.uint8], NDArray[np.bool_]]:
    """A 96-pixel cut of a larger scene."""
    image, masks = np.asarray(scene.image), scene.masks
    return scene, image[y : y + VIEW, x : x + VIEW], masks[:, y : y + VIEW, x : x + VIEW]


def mixed_view(rng: np.random.Generator) -> tuple[Scene, NDArray[np.uint8], NDArray[np.bool_]]:
    """A small scene, or a cut of a large one, as the tiled model sees them."""
    if rng.random() < 0.7:
        return whole(make_scene(rng))
    x, y = (int(v) for v in rng.integers(0, VIEW + 1, 2))
    return tile(make_scene(rng, 2 * VIEW), x, y)


def normalized(images: NDArray[np.uint8]) -> Tensor:
    """Bytes [B, 96, 96, 3] as the tower's input [B, 3, 96, 96], from -1 to 1."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
