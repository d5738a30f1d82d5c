"""The web server of the studio: assembles the page, one line a view, and serves it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from app import api
from app.components import page_assets
from app.components.theme import theme
from app.context import Context
from app.dispatch.local import LocalDispatch
from app.dispatch.runner import Settings
from app.hosted import HostedLimits
from app.live import routes
from app.views import compare, library, papers, studio
from studio_state.catalog import Catalog
from studio_state.claims import Claim, load_claims
from studio_state.errors import Unavailable
from studio_state.paths import DataDir
from studio_state.store import Store

VIEWS = (studio, compare, library, papers)
MAX_THREADS = 200
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def build(context: Context) -> gr.Blocks:
    """The page: one tab a view, and the public endpoints."""
    with gr.Blocks(title="Pareto Studio", analytics_enabled=False, fill_width=True) as page:
        api.build(context)  # first, so that no handler of a view takes the name of an endpoint
        gr.Markdown("# Pareto Studio", elem_id="page-title")
        with gr.Tabs():
            for view in VIEWS:
                with gr.Tab(view.TITLE):
                    view.build(context)
    return page


def launch(page: gr.Blocks, context: Context, host: str, port: int | None, auth: tuple[str, str] | None) -> str:
    """Open the port and serve the page from threads of this process; returns its address.

    Args:
        port: None = the first free one from 7860 on.

    Raises:
        Unavailable: the port is taken.
    """
    page.queue(max_size=256, default_concurrency_limit=8)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            show_error=True,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=["api"],
            max_threads=MAX_THREADS,
            max_file_size="1mb" if context.hosted else None,
            theme=theme(),
            head=page_assets.head(),
            css_paths=page_assets.css_paths(context.hosted is not None),
            app_kwargs={"routes": routes(context.tokens, context.races)},
            prevent_thread_lock=True,
        )
    except OSError as e:
        raise Unavailable(f"port {port or 'from 7860 on'} cannot be opened on {host} ({e}); choose another with --port") from e
    return str(address)


def serve(
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    data_dir: str | Path | None = None,
    devices: Sequence[str] = ("cpu",),
    *,
    local_paths: bool | None = None,
    settings: Settings | None = None,
    hosted: HostedLimits | None = None,
    catalog: Catalog | None = None,
    claims: Mapping[str, Claim] | None = None,
) -> None:
    """Run the studio until Ctrl-C.

    Args:
        auth: user and password that every visitor needs.
        data_dir: None = the default place.
        devices: devices that experiments may run on; one worker each.
        local_paths: whether visitors may open models and files by path; None = only if nobody else can reach the page.
        settings: how workers are started.
        hosted: limits for visitors where strangers can reach the page; then nothing is opened by its path.
        claims: those that the papers page offers; None = the packaged ones.

    Raises:
        StoreError: the data directory cannot be used, or another studio has it.
    """
    data = DataDir.at(data_dir).open()
    if hosted is not None:
        local_paths, settings = False, hosted.settings(settings or Settings())
        os.environ.update(hosted.environment())  # the workers inherit it
    with Store(data) as store, LocalDispatch(data, devices, store, settings) as dispatch:
        context = Context(
            catalog=catalog or Catalog.load(),
            dispatch=dispatch,
            data=data,
            host_token=dispatch.host_token,
            devices=tuple(devices),
            local_paths=host in LOCAL_HOSTS if local_paths is None else local_paths,
            known=[row.id for row in store.experiments(limit=8)],
            store=store,
            claims=load_claims() if claims is None else claims,
            hosted=hosted,
        )
        page = build(context)
        address = launch(page, context, host, port, auth)
        dispatch.warm()
        print(
            f"Pareto Studio: {address}\nTo cancel anybody's runs, open it as the host: {address}?host={dispatch.host_token}",
            flush=True,
        )
        page.block_thread()
