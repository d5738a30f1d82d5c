"""Every metric name, once: unit, which way is better, what it means.

A test checks that no other name is ever emitted and that the docs list all of these.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Source = Literal["measured", "estimated", "simulated"]
Better = Literal["higher", "lower", "neither"]


class MetricInfo(BaseModel):
    """Meaning of one metric.

    Attributes:
        unit: shown after the number.
        better: which way is better.
        group: ``speed``, ``memory``, ``quality`` or ``count``.
        text: one sentence; how it is taken.
        summary: how the values of the items become one number.
    """

    model_config = ConfigDict(frozen=True)
    unit: str
    better: Better
    group: Literal["speed", "memory", "quality", "count"]
    text: str
    summary: Literal["median", "mean", "max", "sum", "last", "given"] = "median"
    ratio: bool = True


def _m(unit: str, better: Better, group: str, text: str, summary: str = "median", ratio: bool = True) -> MetricInfo:
    return MetricInfo(unit=unit, better=better, group=group, text=text, summary=summary, ratio=ratio)


METRICS: dict[str, MetricInfo] = {
    # speed
    "ttft_s": _m("s", "lower", "speed", "Time to first token: from handing over the prompt to the first new token."),
    "prefill_tokens_per_s": _m("tokens/s", "higher", "speed", "Prompt tokens over the time of the prefill, policies' work at its end included."),
    "decode_tokens_per_s": _m("tokens/s", "higher", "speed", "New tokens after the first over the time from the first to the last."),
    "itl_p50_s": _m("s", "lower", "speed", "Median inter-token latency."),
    "itl_p90_s": _m("s", "lower", "speed", "90th percentile of the inter-token latency."),
    "itl_p99_s": _m("s", "lower", "speed", "99th percentile of the inter-token latency; given from 100 latencies on."),
    "end_to_end_s": _m("s", "lower", "speed", "From handing over the prompt to the last new token."),
    "score_tokens_per_s": _m("tokens/s", "higher", "speed", "Continuation tokens scored by the decode path per second."),
    "images_per_s": _m("images/s", "higher", "speed", "Images over the time of their pass through the model, or of their drawing; opening and resizing them is not in it."),
    "seconds_per_image": _m("s", "lower", "speed", "Drawing one picture: encoding what is asked for, all denoising steps, decoding."),
    "denoising_steps_per_s": _m("steps/s", "higher", "speed", "Denoising steps of one picture per second; in a batch the pictures' steps together."),
    "encode_s": _m("s", "lower", "speed", "Encoding the images and choosing among their tokens; part of the time to first token."),
    "products_share": _m("", "neither", "speed", "Share of a decode step's (or pass') time in products of linear maps, recorded in passes of its own.", "mean", False),
    "prefill_products_share": _m("", "neither", "speed", "The same of reading the prompt.", "mean", False),
    "layers_share": _m("", "neither", "speed", "Share of a decode step's (or pass') time inside the model's layers, the rest being embedding, head and what is around them.", "mean", False),
    "prefill_layers_share": _m("", "neither", "speed", "The same of reading the prompt.", "mean", False),
    "roofline_order": _m("", "higher", "speed", "Kendall's tau between predicted and measured times of a decode step over batches and contexts; 1 = the same order.", "mean", False),
    "roofline_reached": _m("", "higher", "speed", "Predicted over measured time of a decode step, the largest over batches and contexts; above 1 the roofline was wrong.", "mean", False),
    "load_s": _m("s", "lower", "speed", "Loading the model; shared by the lanes.", "given", False),
    "build_s": _m("s", "lower", "speed", "Building the lane's replacement modules (packing, calibration).", "given", False),
    "warmup_s": _m("s", "lower", "speed", "Warm-up runs before anything is timed.", "given", False),
    # memory
    "weight_bytes": _m("bytes", "lower", "memory", "Storages of the lane's own weights with their scales; tied tensors once.", "given"),
    "theoretical_weight_bytes": _m("bytes", "lower", "memory", "Bits of a code times the weights of each replaced map, and everything else as it is; scales and padding come on top. Given where weights are replaced.", "given", False),
    "scale_bytes": _m("bytes", "lower", "memory", "Scales, zero points, codebooks and other tables that replaced maps hold beside their codes.", "given", False),
    "padding_bytes": _m("bytes", "lower", "memory", "Bytes of replaced maps that fill up blocks and hold no weight.", "given", False),
    "kv_bytes": _m("bytes", "lower", "memory", "Storages of cached keys and values with scales after the last token; the index of kept positions is not counted.", "median"),
    "prefill_kv_bytes": _m("bytes", "lower", "memory", "The same right after the prefill.", "median"),
    "peak_memory_bytes": _m("bytes", "lower", "memory", "Highest sum of live storages (weights included) in a separate untimed pass.", "max"),
    "peak_activation_bytes": _m("bytes", "lower", "memory", "Peak of what that pass allocated on top of the weights.", "max"),
    "worker_rss_bytes": _m("bytes", "neither", "memory", "Resident memory of the worker process; describes the process, never a lane.", "last", False),
    # quality
    "perplexity": _m("", "lower", "quality", "exp of the mean negative log-likelihood per token, scored by the decode path.", "given"),
    "nll": _m("nats/token", "lower", "quality", "Mean negative log-likelihood per token of one item.", "mean"),
    "accuracy": _m("", "higher", "quality", "Share of items answered correctly.", "mean"),
    "kl_to_baseline": _m("nats", "lower", "quality", "Mean KL divergence of the next-token (or class) distribution from the baseline's, teacher-forced on the baseline's continuation.", "mean", False),
    "top1_agreement": _m("", "higher", "quality", "Share of teacher-forced positions (or images) whose most likely token (or class) equals the baseline's.", "mean", False),
    "feature_similarity": _m("", "higher", "quality", "Cosine of the features (or of the saliency map) and the baseline's; of drawn pictures the features of the zoo's fashion-vit.", "mean", False),
    "psnr": _m("dB", "higher", "quality", "Peak signal-to-noise ratio of a picture to the baseline's of the same seed, mean over the pictures that differ.", "mean", False),
    "ssim": _m("", "higher", "quality", "Structural similarity of a picture to the baseline's of the same seed; 1 = equal.", "mean", False),
    "class_agreement": _m("", "higher", "quality", "Share of drawn pictures in which the zoo's fashion-vit sees the class that was asked for; of real pictures it is right in 90.9 %.", "mean"),
    "frechet_distance": _m("", "lower", "quality", "Fréchet distance of drawn to real pictures on the features of the zoo's fashion-vit; given from 100 pictures on, and comparable at equal numbers only.", "given"),
    "frechet_noise": _m("", "neither", "quality", "The same distance for as many real pictures: what perfect pictures would score.", "given", False),
    "first_divergence": _m("tokens", "higher", "quality", "Tokens before the free-running output differs from the baseline's; the output's length if it never does.", "median", False),
    "same_output": _m("", "higher", "quality", "Share of items whose free-running output equals the baseline's.", "mean", False),
    "p_value": _m("", "neither", "quality", "Paired test against the reference lane (McNemar for accuracy).", "given", False),
    # counts
    "prompt_tokens": _m("tokens", "neither", "count", "Prompt length.", "median", False),
    "visual_tokens": _m("tokens", "lower", "count", "Image tokens that enter the language model, or that leave the last layer of a vision transformer, per image."),
    "new_tokens": _m("tokens", "neither", "count", "Tokens generated.", "median", False),
    "kept_prompt_tokens": _m("tokens", "neither", "count", "Prompt positions still cached after the prefill, mean over layers and heads.", "median"),
    "cached_tokens": _m("tokens", "neither", "count", "Positions cached after the last token, mean over layers and heads.", "median", False),
    "denoising_steps": _m("steps", "lower", "count", "Denoising steps a picture took."),
    "denoiser_calls": _m("calls", "lower", "count", "Runs of the denoiser for a picture; under guidance one run sees every picture twice."),
    "guided_steps": _m("steps", "lower", "count", "Denoising steps with full classifier-free guidance, which see every picture twice."),
    "merged_tokens": _m("tokens", "neither", "count", "Tokens that merging takes out of one self-attention call of the denoiser, mean over all such calls.", "median", False),
    "cache_hits": _m("hits", "higher", "count", "Denoising steps that took a part of their work from an earlier step.", "median", False),
    "forward_passes": _m("passes", "lower", "count", "Forward passes after the prefill."),
    "accepted_tokens": _m("tokens", "higher", "count", "Drafted tokens accepted by the model.", "sum", False),
    "drafted_tokens": _m("tokens", "neither", "count", "Tokens drafted.", "sum", False),
    "replaced_modules": _m("modules", "neither", "count", "Linear modules that the pipeline replaced.", "given", False),
    "mean_bits": _m("bits", "lower", "count", "Bits of one stored weight's code, mean of the weights of all replaced maps, the head's included; scales and padding are not counted.", "given", False),
    "zero_weights": _m("", "neither", "count", "Share of the targeted weights that are exactly zero.", "given", False),
    "table_operations": _m("", "lower", "count", "Entries of look-up tables and look-ups for one token, over the multiply-adds of the same linear maps; counted from their shapes, it is no time.", "given", False),
    "simulated_area": _m("", "lower", "count", "Chip area of look-up units over that of FP16 multiply-add units of the same throughput, for the maps that look up; simulated from published figures of their parts.", "given", False),
    "simulated_energy": _m("", "lower", "count", "Energy of one token's products in look-up units over that of FP16 multiply-adds, for the maps that look up; simulated likewise, memory not in it.", "given", False),
    "expert_load_entropy": _m("", "neither", "count", "How evenly tokens are shared among a layer's experts: entropy of their shares over its largest possible value, mean of the layers; 1 = all equal.", "mean", False),
    "experts_used": _m("experts", "neither", "count", "Experts of a layer that got any token, mean of the layers.", "mean", False),
    "expert_top_k": _m("experts", "lower", "count", "Experts that a token visits in a layer, mean of tokens and layers; a shared expert is not counted.", "mean", False),
    "skipped_macs": _m("", "higher", "count", "Share of the multiply-adds of queries with keys, in prefill and decoding, that unchanged numbers of a key make unnecessary; counted, they are not skipped in time.", "mean", False),
    "skipped_inputs": _m("", "higher", "count", "Share of the multiply-adds of linear maps with masked inputs that fall away because the input counts as zero, in prefill and decoding; they are saved in time only where single columns are read.", "mean", False),
    "unread_kv_share": _m("", "higher", "count", "Share of cached positions that a decode step leaves unread, mean of steps, layers and heads; they stay cached.", "mean", False),
    "memory_bound_share": _m("", "neither", "count", "Share of a decode step's (or pass') roofline time in parts that memory limits; from counted operations and bytes and the device's profile.", "given", False),
    "prefill_memory_bound_share": _m("", "neither", "count", "The same of reading the prompt.", "given", False),
    "roofline_decode_s": _m("s", "lower", "count", "The least time of a decode step (or pass) that the device's roofline allows for its linear maps and attention; calculated.", "given", False),
    "roofline_prefill_s": _m("s", "lower", "count", "The same of reading the prompt.", "given", False),
    "quantized_kv_share": _m("", "neither", "count", "Share of cached positions stored in the quantized format.", "median", False),
}  # fmt: skip
