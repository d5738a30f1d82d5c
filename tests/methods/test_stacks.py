"""The resource table: stacks that make sense and stacks that do not, listed by hand."""

from __future__ import annotations

import pytest

from studio_state.catalog import STAGES
from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from workers.methods import catalogue, discover, effective

CATALOG = catalogue()
KNOWN = set(discover())

LEGAL = (
    "baseline",
    "rtn",
    "rtn:bits=4",
    "magnitude+rtn",
    "magnitude+rtn:bits=4",
    "magnitude+dynamic-int8",
    "magnitude+snapkv",
    "rtn+snapkv",
    "rtn+snapkv+kivi+lean-decode",
    "rtn:bits=4+kivi:bits=2+lean-decode",
    "dynamic-int8+streamingllm",
    "dynamic-int8+lean-decode",
    "snapkv+kivi",
    "streamingllm+kivi",
    "knorm+kivi",
    "h2o+kivi",
    "snapkv+lean-decode",
    "h2o+lean-decode",
    "streamingllm+lean-decode",
    "kivi+lean-decode",
    "prompt-lookup",
    "prompt-lookup+lean-decode",
    "rtn+prompt-lookup",
    "rtn:bits=4+prompt-lookup+lean-decode",
    "magnitude+rtn+prompt-lookup+lean-decode",
    "promptdistill+snapkv",
    "promptdistill+h2o",
    "promptdistill+kivi",
    "promptdistill:truncate=true+kivi",
    "promptdistill+prompt-lookup",
    "promptdistill:truncate=true+prompt-lookup",
    "promptdistill+snapkv+kivi+lean-decode",
    "magnitude+rtn+promptdistill+knorm+kivi+lean-decode",
    "gemfilter+snapkv",
    "deltallm+snapkv+lean-decode",
    "snapkv+think",
    "h2o+gear",
    "streamingllm+minicache",  # all layers keep the same positions
    "innovation-cache+minicache",
    "quest+kivi+lean-decode",
    "tova+kivi",
    "cam:when=prefill+gear",  # merged before anything is packed
    "look-m:when=both,merge=none,every=4+think",  # nothing is written into what is stored
    "expert-prune+top-k-experts",
    "magnitude+expert-prune+rtn+snapkv+top-k-experts",
    "gptq+snapkv+kivi+lean-decode",
    "magnitude+gptq:bits=3,act_order=true+prompt-lookup",
    "magnitude+awq+lean-decode",
    "awq:bits=3+promptdistill+h2o",
    "magnitude+hqq:bits=3+streamingllm",
    "magnitude+mixed-bits:bits=3.5+snapkv+lean-decode",
    "magnitude+lut-gemm:fit=uniform+snapkv+kivi+lean-decode",
    "lut-tensor-core:bits=1,tables=float+prompt-lookup+lean-decode",
    "magnitude+quantizer:per=matrix,points=kmeans+h2o",
    "magnitude+dfloat11+snapkv+kivi+lean-decode",
    "magnitude:sparsity=0.7+flash-llm+snapkv+lean-decode",
    "wanda:sparsity=0.8+flash-llm:sparsity=0+prompt-lookup",
    "wanda+rtn:bits=4",
    "sparsegpt:pattern=2:4+gptq",
    "magnitude+wanda",  # masks are edited in turn
    "rtn:bits=4+snapkv+wina+lean-decode",
    "wanda+rtn+kivi+teal+lean-decode",
    "top-k-experts+wina",
    "rtn:bits=4+snapkv+quantized-activations+lean-decode",
    "awq+wina+quantized-activations+kivi",
    "fp8+quantized-activations",
    "magnitude+smoothquant+snapkv+lean-decode",
    "llm-int8:threshold=4+kivi+lean-decode",
    "quarot+kivi:bits=4+lean-decode",  # weights, activations and cache in 4 bits, as in the paper
    "magnitude+quarot:activation_bits=16,head=same+prompt-lookup",  # the mask is rotated away, the pruned function is kept
    "magnitude+fp8:activations=fp8+streamingllm",
    "lean-decode+kivi+snapkv+rtn",  # written in any order
)

ILLEGAL = {
    # two deciders of one thing
    "snapkv+h2o": "kv.length",
    "snapkv+streamingllm": "kv.length",
    "snapkv+knorm": "kv.length",
    "h2o+streamingllm": "kv.length",
    "h2o+knorm": "kv.length",
    "knorm+streamingllm": "kv.length",
    "rtn+snapkv+kivi+h2o": "kv.length",
    "promptdistill:truncate=true+snapkv": "kv.length",
    "promptdistill:truncate=true+h2o": "kv.length",
    "promptdistill:truncate=true+knorm": "kv.length",
    "promptdistill:truncate=true+streamingllm": "kv.length",
    "tova+finch": "kv.length",
    "gemfilter+promptdistill": "tokens.prompt",
    "gear+kivi": "kv.dtype",
    "think+kivi": "kv.dtype",  # the paper joins them; here a store has one form
    "rtn+dynamic-int8": "weights.format",
    "rtn:bits=4+dynamic-int8": "weights.format",
    "rtn+dfloat11": "weights.format",
    "magnitude+dfloat11+flash-llm": "weights.format",
    "flash-llm+gptq": "weights.format",
    "flash-llm+flash-llm:sparsity=0.9": "twice",
    "magnitude+rtn+dynamic-int8+lean-decode": "weights.format",
    "gptq+awq": "weights.format",
    "gptq:bits=3+snapkv+rtn": "weights.format",
    "hqq+mixed-bits": "weights.format",
    "awq+dynamic-int8+lean-decode": "weights.format",
    "lut-gemm+lut-tensor-core": "weights.format",
    "quantizer:bits=8+rtn": "weights.format",
    "gptq+lut-gemm": "weights.format",
    "lut-gemm:bits=5": "a whole number from 1 to 4",
    "quantizer:points=octaves": "uniform, kmeans, powers",
    "smoothquant+dynamic-int8": "weights.format",
    "awq+quarot": "weights.format",  # the paper's authors round rotated weights with GPTQ; here one method rounds
    "fp8+llm-int8+lean-decode": "weights.format",
    "dynamic-int8+quantized-activations": "activations.format",
    "quarot:activation_bits=8+quantized-activations": "activations.format",
    "fp8:activations=fp8+quantized-activations+lean-decode": "activations.format",
    # what is written in full precision, and what packs it
    "deltallm+kivi": "kv.dtype",
    "cam+gear": "kv.dtype",
    "look-m:when=both+think": "kv.dtype",
    # layers that share what they keep, or tell a token's likelihood, must all hold it
    "minicache+snapkv": "kv.uniform",
    "streamingllm:layers=pyramid+minicache": "kv.uniform",
    "innovation-cache:layers=given+minicache": "kv.uniform",
    "promptdistill+innovation-cache": "kv.uniform",
    "promptdistill:truncate=true,stages=2,truncate_stages=1+minicache": "kv.uniform",
    # the same twice
    "snapkv+snapkv": "twice",
    "snapkv:keep=0.5+kivi+snapkv:keep=0.25": "twice",
    "kivi:bits=2+kivi:bits=4": "twice",
    "rtn:bits=8+rtn:bits=4": "twice",
    "top-k-experts+top-k-experts:threshold=0.5": "twice",
    "lean-decode+lean-decode": "twice",
    "promptdistill+promptdistill": "twice",
    "prompt-lookup+prompt-lookup": "twice",
    # drafts must be taken back, an evicted or packed cache cannot
    "snapkv+prompt-lookup": "kv.rollback",
    "h2o+prompt-lookup": "kv.rollback",
    "knorm+prompt-lookup": "kv.rollback",
    "streamingllm+prompt-lookup": "kv.rollback",
    "kivi+prompt-lookup": "kv.rollback",
    "deltallm+prompt-lookup": "kv.rollback",
    "prompt-lookup+kivi": "kv.rollback",
    "rtn+snapkv+prompt-lookup+lean-decode": "kv.rollback",
    # one decides which inputs count
    "wina+teal": "activations.sparsity",
    "rtn+teal+wina+lean-decode": "activations.sparsity",
    "wina:keep=0.01": "a number from 0.05 to 1.0",
    "wanda:pattern=2:8": "2:4",
    # unknown things
    "snapkw": "did you mean 'snapkv'",
    "snapkv:kep=0.5": "did you mean 'keep'",
    "mixed-bits:bits=1.5": "a number from 2",
    "snapkv:keep=2": "a number from 0.01 to 1.0",
    "kivi:bits=3": "2, 4, 8",
    "kivi:group_size=12": "divisible by 8",
    "smoothquant:alpha=2": "a number from 0.0 to 1.0",
    "quarot:activation_bits=5": "4, 8, 16",
}


def messages(text: str, **more: object) -> list[str]:
    return [p.message for p in pipeline_problems(parse_pipeline(text), CATALOG, **more)]  # type: ignore[arg-type]


def test_the_lists_are_long_enough_and_cover_every_policy() -> None:
    assert len(LEGAL) >= 25
    assert len(ILLEGAL) >= 25
    used = {s.policy for text in LEGAL for s in parse_pipeline(text).steps}
    assert (
        {"rtn", "dynamic-int8", "magnitude", "snapkv", "kivi", "lean-decode", "prompt-lookup", "promptdistill"} <= used <= KNOWN
    )


@pytest.mark.parametrize("text", LEGAL)
def test_legal(text: str) -> None:
    assert messages(text) == []
    stages = [STAGES.index(p.card.stage or "") for p in effective(parse_pipeline(text))]
    assert stages == sorted(stages)


@pytest.mark.parametrize(("text", "because"), ILLEGAL.items())
def test_illegal(text: str, because: str) -> None:
    found = messages(text)
    assert any(because in m for m in found), found


@pytest.mark.parametrize(
    ("text", "more", "because"),
    [
        ("promptdistill", {"chunked": True}, "whole prompt in one prefill"),
        ("rtn+prompt-lookup", {"batch": 4}, "at most 1 item at a time, but the batch is 4"),
        ("prompt-lookup", {"workload": "perplexity"}, "means nothing for workload 'perplexity'"),
    ],
)
def test_illegal_in_this_experiment(text: str, more: dict[str, object], because: str) -> None:
    assert messages(text) == []
    found = messages(text, **more)
    assert len(found) == 1
    assert because in found[0]


def test_a_clash_names_both_and_offers_to_remove_one() -> None:
    (problem,) = pipeline_problems(parse_pipeline("rtn+snapkv+h2o"), CATALOG)
    assert "SnapKV" in problem.message
    assert "H2O" in problem.message
    assert problem.mend is not None
    assert (problem.mend.action, problem.mend.step) == ("remove", 2)
