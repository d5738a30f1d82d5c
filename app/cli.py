"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli_calibrate import calibrate
from app.cli_export import export_model
from app.cli_space import space
from app.cli_train import train
from studio_state.errors import SpecError

cli = typer.Typer(
    name="pareto-studio",
    help="Race efficiency policies against a model's own baseline, with every run kept. Without a command: open the studio.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo_commands = typer.Typer(help="Models that the studio knows by name.", no_args_is_help=True)
cli.add_typer(zoo_commands, name="zoo")

DataOption = Annotated[
    Path | None, typer.Option("--data-dir", help="Where runs are kept; default: $PARETO_STUDIO_DATA or the user's data folder.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = reachable from other machines (use --auth).")]
PortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; default: 7860 or the next free one.")]
AuthOption = Annotated[str | None, typer.Option(metavar="USER:PASS", help="Ask for this name and password.")]
DevicesOption = Annotated[str, typer.Option(help="Devices to offer, separated by commas, for example cpu,cuda:0.")]

HostedOption = Annotated[
    bool,
    typer.Option(
        "--hosted", help="For strangers: no models or files by path, bounded experiments, a record that nobody changes."
    ),
]


@cli.callback(invoke_without_command=True)
def studio(
    ctx: typer.Context,
    host: HostOption = "127.0.0.1",
    port: PortOption = None,
    auth: AuthOption = None,
    data_dir: DataOption = None,
    devices: DevicesOption = "cpu",
    hosted: HostedOption = False,
) -> None:
    """Race efficiency policies against a model's own baseline, with every run kept. Without a command: open the studio."""
    if ctx.invoked_subcommand is None:
        open_studio(host, port, auth, data_dir, devices, hosted)


@cli.command()
def serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = None,
    auth: AuthOption = None,
    data_dir: DataOption = None,
    devices: DevicesOption = "cpu",
    hosted: HostedOption = False,
) -> None:
    """Open the studio (the same as no command)."""
    open_studio(host, port, auth, data_dir, devices, hosted)


def open_studio(host: str, port: int | None, auth: str | None, data_dir: Path | None, devices: str, hosted: bool = False) -> None:
    """Start the web page.

    Raises:
        SpecError: ``auth`` or ``devices`` cannot be read.
    """
    from app.hosted import HostedLimits
    from app.server import serve as serve_page

    limits = HostedLimits() if hosted else None
    serve_page(host, port, read_auth(auth), data_dir, read_devices(devices), hosted=limits)


def read_auth(auth: str | None) -> tuple[str, str] | None:
    """``USER:PASS`` as a pair.

    Raises:
        SpecError: one of the two is missing.
    """
    if auth is None:
        return None
    user, sign, password = auth.partition(":")
    if not user or not sign or not password:
        raise SpecError("cannot read --auth: write USER:PASS, for example --auth ann:a-long-password")
    return user, password


def read_devices(devices: str) -> tuple[str, ...]:
    """Names separated by commas, each once.

    Raises:
        SpecError: there is none.
    """
    names = tuple(dict.fromkeys(d.strip() for d in devices.split(",") if d.strip()))
    if not names:
        raise SpecError(f"cannot read --devices {devices!r}: write names separated by commas, for example cpu,cuda:0")
    return names


@cli.command()
def run(
    model: Annotated[str, typer.Option(help="Zoo id, Hub id org/name[@revision], folder or GGUF file.")],
    workload: Annotated[str, typer.Option(help="What to run; see `workloads`.")],
    lane: Annotated[
        list[str] | None,
        typer.Option(help="A pipeline: rtn:bits=4+snapkv:keep=0.25, or @file.json; the baseline is always there."),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the workload.")] = None,
    sweep: Annotated[list[str] | None, typer.Option(metavar="POLICY.KNOB=V,V", help="One lane per value of a knob.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: OMP_NUM_THREADS, else all cores.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same items and draws.")] = 0,
    batch: Annotated[int, typer.Option(help="Items that run together.")] = 1,
    chunk_size: Annotated[int | None, typer.Option(help="Prompt tokens per prefill step; default: all at once.")] = None,
    attention: Annotated[str, typer.Option(help="sdpa or eager, the same in every lane.")] = "sdpa",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens generated per item; default: the workload's own.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt for the chat template.")] = None,
    chat_template: Annotated[bool, typer.Option(help="Wrap prompts in the model's own chat template.")] = True,
    eos: Annotated[str, typer.Option(help="stop or ignore (always the full number of tokens).")] = "stop",
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 = off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 = off.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="How often every item is timed in every lane.")] = 1,
    reference: Annotated[int, typer.Option(help="Lane that the ratios are taken to; 0 = the baseline.")] = 0,
    isolate: Annotated[bool, typer.Option("--isolate", help="A fresh worker process for every lane.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Afterwards look for where every lane's time goes, and say why it is not faster.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait while another process uses the device.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything that came of it.")] = None,
    data_dir: DataOption = None,
) -> None:
    """Race lanes against the baseline: progress on stderr, a table on stdout.

    Exit status: 0 all lanes finished, 2 refused (every reason is printed), 130 Ctrl-C, 1 anything else.
    """
    from app.cli_spec import build_lanes, make_spec, parse_settings

    spec = make_spec(
        {
            "model": model,
            "workload": {"id": workload, "options": parse_settings(settings or [])},
            "lanes": build_lanes(lane or [], sweep or []),
            "sampling": {"temperature": temperature, "top_k": top_k, "top_p": top_p},
            "device": device,
            "dtype": dtype,
            "threads": threads,
            "seed": seed,
            "batch": batch,
            "chunk_size": chunk_size,
            "attention": attention,
            "max_new_tokens": max_new_tokens,
            "system_prompt": system_prompt,
            "chat_template": chat_template,
            "eos": eos,
            "repeats": repeats,
            "reference": reference,
            "isolate": isolate,
            "analyzers": ["runtime-dissection", "llm-viewer"] if explain else [],
            "trust_remote_code": trust_remote_code,
        }
    )
    raise typer.Exit(_run_checked(spec, data_dir, wait, json_file, "cli")[1])


def _run_checked(spec: Any, data_dir: Path | None, wait: bool, json_file: Path | None, origin: str) -> tuple[dict[str, Any], int]:
    from app.cli_spec import check
    from studio_state.catalog import Catalog
    from studio_state.paths import DataDir

    check(spec, Catalog.load())
    from app.cli_run import run_and_show
    from app.dispatch.runner import Settings

    return run_and_show(spec, DataDir.at(data_dir).open(), Settings(wait_for_device=wait), json_file, origin)


@cli.command()
def replay(
    card: Annotated[Path, typer.Argument(help="A document written by --json, or a run card.")],
    wait: Annotated[bool, typer.Option(help="Wait while another process uses the device.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything that came of it.")] = None,
    data_dir: DataOption = None,
) -> None:
    """Run the experiment of a document again and say which metrics are the same.

    Exit status 0: all lanes finished, and every count, size, quality and output is the same; speed may differ.
    """
    from app.cli_replay import comparison_table, read_card
    from app.cli_table import wide_console
    from studio_state.paths import DataDir
    from studio_state.replay import compare_runs
    from studio_state.runcard_record import export_card

    spec, before = read_card(card)
    report, status = _run_checked(spec, data_dir, wait, json_file, "replay")
    now = export_card(DataDir.at(data_dir), report["experiment"]["id"])
    found = compare_runs(before, now.document())
    wide_console().print(comparison_table(found.rows, found.ratios))
    print("\n".join(found.sentences()))
    raise typer.Exit(status or int(found.verdict != "same"))


@cli.command()
def claim(
    name: Annotated[str | None, typer.Argument(metavar="[ID]", help="Id of the claim; without one, all are listed.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the claims.")] = False,
    model: Annotated[str | None, typer.Option(help="Another model than the claim's own.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    wait: Annotated[bool, typer.Option(help="Wait while another process uses the device.")] = True,
    as_json: JsonFlag = False,
    data_dir: DataOption = None,
) -> None:
    """Check a paper's headline here: run its lanes, judge them, keep the verdict.

    Exit status: 0 whatever the verdict, 1 if a run failed, 2 refused, 130 Ctrl-C.
    """
    from app.cli_claim import run_claim, show_claims
    from studio_state.claims import find_claim
    from studio_state.paths import DataDir

    if name is None or show_list:
        return show_claims(as_json)
    found = find_claim(name)
    from app.dispatch.runner import Settings

    raise typer.Exit(run_claim(found, DataDir.at(data_dir).open(), Settings(wait_for_device=wait), model, device, as_json))


@cli.command()
def export(
    experiment: Annotated[str, typer.Argument(help="Id of an experiment; see `history`.")],
    card: Annotated[Path | None, typer.Option(help="Write its run card (JSON) to this file.")] = None,
    script: Annotated[Path | None, typer.Option(help="Write one lane as a standalone Python script to this file.")] = None,
    lane: Annotated[int, typer.Option(help="Lane of the script; 0 = the baseline.")] = 1,
    data_dir: DataOption = None,
) -> None:
    """Write an experiment as a run card, or one of its lanes as a script that runs without the studio."""
    from app.cli_history import export_experiment
    from studio_state.paths import DataDir

    export_experiment(DataDir.at(data_dir).open(), experiment, card, script, lane)


@cli.command()
def methods(as_json: JsonFlag = False) -> None:
    """List all methods with their knobs."""
    from app.cli_lists import show_methods

    show_methods(as_json)


@cli.command()
def workloads(as_json: JsonFlag = False) -> None:
    """List all workloads with their options."""
    from app.cli_lists import show_workloads

    show_workloads(as_json)


@cli.command()
@zoo_commands.command("list")
def models(as_json: JsonFlag = False) -> None:
    """List the models of the zoo: source, licence, size, and whether they are here already."""
    from app.cli_lists import show_models

    show_models(as_json)


@zoo_commands.command("fetch")
def zoo_fetch(model: Annotated[str, typer.Argument(help="Id of the model; see `zoo list`.")]) -> None:
    """Fetch a model of the zoo into the cache, so that it runs offline."""
    from app.cli_fetch import fetch

    fetch(model)


cli.command()(train)
cli.command("export-model")(export_model)
cli.command()(calibrate)
cli.command()(space)


@cli.command()
def history(
    experiment: Annotated[str | None, typer.Argument(help="Show one experiment with its results.")] = None,
    sql: Annotated[
        str | None, typer.Option(help="One SELECT over the views experiments, runs, metrics, ratios, outputs, results ...")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Newest experiments to show.")] = 20,
    as_json: JsonFlag = False,
    data_dir: DataOption = None,
) -> None:
    """Show what was run, newest first; --sql asks anything of the record."""
    from app.cli_history import show_experiment, show_history, show_sql
    from studio_state.paths import DataDir

    data = DataDir.at(data_dir)
    if sql is not None:
        show_sql(data, sys.stdin.read() if sql == "-" else sql, as_json)
    elif experiment is not None:
        show_experiment(data, experiment, as_json)
    else:
        show_history(data, limit, as_json)
