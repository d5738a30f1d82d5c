"""One pipeline on given prompts, without engine, record or screen: what an exported script runs.

``app/script_export.py`` writes this module and everything it imports into one file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio_state.errors import ModelError, StudioError, WorkloadError
from studio_state.experiment import ExperimentSpec, ModelInfo
from workers.families.llm import LanguageFamily
from workers.mechanisms.attention import NAME as ATTENTION
from workers.session import Session
from workers.workloads.base import Item

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(settings: dict[str, Any], arguments: Sequence[str] | None = None) -> int:
    """Run the script; the exit status is 1 if tokens differ from the recorded ones or something fails.

    Args:
        settings: written by the export: ``model``, ``revision``, ``spec``, ``info``, ``policies`` (module, class and
            knobs each, in the order in which they act) and ``recorded`` (prompt, pieces, token_ids of each item).
    """
    parser = argparse.ArgumentParser(
        description=f"The pipeline {settings['pipeline']} on {settings['model']}, exported by Pareto Studio."
    )
    parser.add_argument("--model", default=settings["model"], help="folder, GGUF file or Hub id (default: %(default)s)")
    parser.add_argument("--device", default=settings["spec"]["device"], help="cpu, cuda ... (default: %(default)s)")
    parser.add_argument("--prompt", help="a prompt of your own instead of the recorded ones")
    given = parser.parse_args(arguments)
    try:
        session, policies = prepare(settings, given.model, given.device)
        if given.prompt is not None:
            print(generate(session, policies, Item(id="prompt", prompt=given.prompt))[1])
            return 0
        return int(not replay(session, policies, settings["recorded"]))
    except StudioError as e:
        print(e, file=sys.stderr)
        return 1


def prepare(settings: dict[str, Any], model: str, device: str) -> tuple[Session, list[Any]]:
    """The model with its session, and the policies with everything built that they need."""
    spec = ExperimentSpec.model_validate({**settings["spec"], "device": device})
    info = ModelInfo.model_validate(settings["info"])
    if spec.threads:
        torch.set_num_threads(spec.threads)
    where = torch.device(device)
    dtype = DTYPES[("float32" if where.type == "cpu" else info.dtype or "bfloat16") if spec.dtype == "auto" else spec.dtype]
    loaded, tokenizer = load(model, settings.get("revision") or None, dtype)
    loaded = loaded.to(where).requires_grad_(False).eval()
    session = Session(spec=spec, info=info, family=LanguageFamily(), model=loaded, processor=tokenizer, device=where, dtype=dtype)
    policies = [getattr(import_module(module), name).model_validate(knobs) for module, name, knobs in settings["policies"]]
    with ExitStack() as stack:
        for policy in policies:
            policy.prepare(session)
            stack.enter_context(policy.attach(session))
    return session, policies


def load(model: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Weights (safetensors or GGUF, never pickle) and tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        if model.endswith(".gguf"):
            from workers.models import gguf_file

            tokenizer = gguf_file.load_tokenizer(Path(model))
            loaded = gguf_file.load_model(Path(model), dtype, attn_implementation=ATTENTION)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
            loaded = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype, attn_implementation=ATTENTION, use_safetensors=True
            )
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot load {model}: {str(e).splitlines()[0]}; give --model a folder, a GGUF file or a Hub id") from e
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return loaded, tokenizer


def generate(session: Session, policies: Sequence[Any], item: Item) -> tuple[list[int], str]:
    """Tokens and text that the pipeline makes of one prompt."""
    with ExitStack() as stack:
        for policy in policies:
            stack.enter_context(policy.attach(session))
        trace = session.family.begin(session, [item])
        for _ in session.family.run(session, trace):
            pass
    return trace.results[0].token_ids, trace.results[0].text


def replay(session: Session, policies: Sequence[Any], recorded: Sequence[dict[str, Any]]) -> bool:
    """Run the recorded prompts for as many tokens as were recorded; True if all tokens are the same."""
    alike = 0
    for entry in recorded:
        wanted = entry["token_ids"]
        ids = encoded(session.processor, entry)
        with session.having(spec=session.spec.model_copy(update={"max_new_tokens": len(wanted)})):
            tokens, text = generate(session, policies, Item(id=entry["item"], prompt_ids=tuple(ids), ignore_eos=True))
        alike += tokens == wanted
        print(
            f"{entry['item']}: {'the same tokens as recorded' if tokens == wanted else 'other tokens than recorded'}\n{text}\ntokens: {tokens}"
        )
    print(f"{alike} of {len(recorded)} outputs have the recorded tokens")
    return alike == len(recorded)


def encoded(tokenizer: Any, entry: dict[str, Any]) -> list[int]:
    """The recorded prompt as token ids.

    Raises:
        WorkloadError: this tokenizer cuts it in another way than the one of the record.
    """
    for special in (False, True):
        ids = list(tokenizer(entry["prompt"], add_special_tokens=special)["input_ids"])
        if [tokenizer.decode([t]) for t in ids] == entry["pieces"]:
            return ids
    raise WorkloadError(
        f"item {entry['item']}: the tokenizer cuts the prompt in another way than in the record; give --model the same model"
    )
