"""Self-attention of a denoiser over fewer tokens: alike ones are merged before it and copied apart behind it.

Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion", arXiv:2303.17604. The library's ``Attention`` modules
stay; their processor, which computes them, is exchanged.

Shapes: B rows, T = H x W tokens of width C, r merged tokens; attention gets [B, T, C] or [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio_state.errors import Unavailable
from workers.mechanisms.token_merging import Matching
from workers.session import Session

Grid = tuple[int, int]
Choose = Callable[[Tensor, Grid | None], Matching | None]  # (tokens [B, T, C], their grid where it is known)
PROCESSOR = "AttnProcessor2_0"  # the library's plain one; others turn positions or join texts to the tokens


class MergedAttention:
    """A processor for the library's ``Attention`` modules.

    Args:
        plain: the module's own processor, for every call in which nothing is merged.
        choose: which tokens become one; None = all stay.
    """

    def __init__(self, plain: Callable[..., Tensor], choose: Choose):
        self.plain, self.choose = plain, choose

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend as the library does (norm and residual of the module included), over the merged tokens."""
        grid = (hidden_states.shape[2], hidden_states.shape[3]) if hidden_states.ndim == 4 else None
        tokens = hidden_states.flatten(2).transpose(1, 2) if grid else hidden_states
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        alone = encoder_hidden_states is None and attention_mask is None
        matching = self.choose(tokens, grid) if alone else None
        if matching is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        merged, _ = matching.merge(tokens, torch.ones(tokens.shape[:2], device=tokens.device))
        out = attend(attn, merged).gather(1, matching.new[..., None].expand_as(tokens))
        if grid:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        scaled: Tensor = out / attn.rescale_output_factor
        return scaled


def attend(attn: Any, tokens: Tensor) -> Tensor:
    """The module's self-attention of [B, T, C] without its norm and residual, as the library's processor computes it."""

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

    query, key, value = heads(attn.to_q(tokens)), heads(attn.to_k(tokens)), heads(attn.to_v(tokens))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
    out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
    return out


def grid_of(tokens: int, height: int, width: int) -> Grid:
    """Rows and columns in which T tokens lie, when the denoiser works on height x width: divided by a whole number.

    Raises:
        Unavailable: no whole number fits.
    """
    for by in range(1, max(height, width) + 1):
        if ceil(height / by) * ceil(width / by) == tokens:
            return ceil(height / by), ceil(width / by)
    raise Unavailable(
        f"attention over {tokens} tokens fits no grid of a {height} x {width} sample; detach the policy that merges them"
    )


def targets_of(grid: Grid, seed: int) -> Tensor:
    """The tokens that others go into [D]: one of each 2 x 2 cell, drawn from the seed. Cut cells at the edges have none."""
    rows, columns = grid[0] // 2, grid[1] // 2
    drawn = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(seed))
    down = 2 * torch.arange(rows)[:, None] + drawn // 2
    along = 2 * torch.arange(columns) + drawn % 2
    return (down * grid[1] + along).flatten()


def match_to(tokens: Tensor, targets: Tensor, r: int) -> Matching:
    """Pair the r tokens of [B, T, C] that are most like a target (by cosine) with it."""
    b, t, _ = tokens.shape
    free = torch.ones(t, dtype=torch.bool)
    free[targets] = False
    sources, targets = free.nonzero()[:, 0].to(tokens.device), targets.to(tokens.device)
    r = min(r, len(sources)) if len(targets) else 0
    if r <= 0:
        return Matching(torch.arange(t, device=tokens.device).expand(b, -1), t)
    unit = F.normalize(tokens.float(), dim=-1)
    best, partner = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    going, staying = order[:, :r], order[:, r:]
    places = torch.empty(b, t, dtype=torch.long, device=tokens.device)
    places[:, targets] = torch.arange(len(targets), device=tokens.device)
    places.scatter_(1, sources[staying], torch.arange(len(targets), t - r, device=tokens.device).expand(b, -1))
    places.scatter_(1, sources[going], partner.gather(1, going))
    return Matching(places, t - r)


def self_attentions(session: Session) -> list[Any]:
    """The denoiser's attention modules that look at the picture's own tokens.

    Raises:
        Unavailable: it has none, or some that also look at the tokens of a text or turn positions.
    """
    found: list[Any] = [session.model.get_submodule(name) for name in session.family.parts(session.model)["attentions"]]
    for module in found:
        processor = type(getattr(module, "processor", None)).__name__
        if processor != PROCESSOR or getattr(module, "added_kv_proj_dim", None) or getattr(module, "spatial_norm", None):
            raise Unavailable(
                f"this model attends by {processor}, which joins the picture's tokens with a text's or turns positions; "
                f"allowed: models whose attention is the library's plain {PROCESSOR} (Stable Diffusion, DiT, PixArt)"
            )
    own = [module for module in found if not module.is_cross_attention]
    if not own:
        raise Unavailable("this model has no self-attention; choose one that has, or detach the policy that merges its tokens")
    return own


@contextmanager
def merging(session: Session, choose: Callable[[Tensor, Grid], Matching | None]) -> Iterator[None]:
    """Have every self-attention of the denoiser merge what ``choose`` pairs, for a while.

    Args:
        choose: (tokens [B, T, C] as attention gets them, behind every norm, and their grid) -> pairs; None = all stay.
    """
    model: Any = session.model
    size: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        size[:] = taken.shape[-2:]

    def paired(tokens: Tensor, grid: Grid | None) -> Matching | None:
        return choose(tokens, grid or grid_of(tokens.shape[1], *size))

    with ExitStack() as stack:
        stack.callback(model.denoiser.register_forward_pre_hook(note, with_kwargs=True).remove)
        for module in self_attentions(session):
            stack.callback(setattr, module, "processor", module.processor)
            module.processor = MergedAttention(module.processor, paired)
        yield
