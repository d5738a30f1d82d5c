// Dragging by mouse, pen and touch: one code path. Knows rows and lists, not what they mean.
(() => {
  const PS = window.ParetoStudio, { el } = PS;
  const START_PX = 5, REACH_PX = 24, EDGE_PX = 48;

  /**
   * @param root    the component
   * @param source  (target, pointerType) -> {node, id?, policy?} or null: what is picked up
   * @param place   (lane node, rows before the pointer, what) -> index at which the mark is drawn, or null
   * @param drop    (what, lane node, index)
   */
  PS.dragging = (root, { source, place, drop }) => {
    let drag = null;

    const laneAt = (x, y) => [...root.querySelectorAll('[data-lane]')].find((lane) => {
      const r = lane.getBoundingClientRect();
      return x >= r.left - REACH_PX / 2 && x <= r.right + REACH_PX / 2 && y >= r.top - REACH_PX && y <= r.bottom + REACH_PX;
    });

    const rowsOf = (lane) => [...lane.querySelectorAll('[data-step]')].filter((row) => row.dataset.step !== drag.what.id);

    function begin(e) {
      drag.on = true;
      const box = drag.what.node.getBoundingClientRect();
      drag.dx = drag.x - box.left;
      drag.dy = drag.y - box.top;
      drag.ghost = drag.what.node.cloneNode(true);
      drag.ghost.classList.add('pe-ghost');
      drag.ghost.setAttribute('aria-hidden', 'true');
      drag.ghost.querySelectorAll('[id]').forEach((n) => n.removeAttribute('id'));
      drag.ghost.style.width = `${box.width}px`;
      root.appendChild(drag.ghost);
      drag.what.node.classList.add('pe-dragged');
      drag.mark = el('li', { class: 'pe-drop', 'aria-hidden': 'true' });
      getSelection()?.removeAllRanges();
    }

    function follow(e) {
      if (!drag || e.pointerId !== drag.pointer) return;
      if (!drag.on && Math.hypot(e.clientX - drag.x, e.clientY - drag.y) < START_PX) return;
      if (!drag.on) begin(e);
      e.preventDefault();
      drag.ghost.style.transform = `translate(${e.clientX - drag.dx}px, ${e.clientY - drag.dy}px)`;
      if (e.clientY < EDGE_PX) scrollBy(0, -12); else if (e.clientY > innerHeight - EDGE_PX) scrollBy(0, 12);
      drag.lane = laneAt(e.clientX, e.clientY) || null;
      root.querySelectorAll('.pe-over').forEach((n) => n.classList.toggle('pe-over', n === drag.lane));
      if (!drag.lane) { drag.at = null; return drag.mark.remove(); }
      drag.lane.classList.add('pe-over');
      const rows = rowsOf(drag.lane);
      const before = rows.filter((row) => { const r = row.getBoundingClientRect(); return e.clientY > r.top + r.height / 2; }).length;
      drag.at = place(drag.lane, before, drag.what);
      drag.lane.querySelector('[data-steps]').insertBefore(drag.mark, rows[drag.at] || null);
    }

    function finish(e, cancelled) {
      if (!drag || (e.pointerId !== undefined && e.pointerId !== drag.pointer)) return;
      const done = drag;
      drag = null;
      done.ghost?.remove();
      done.mark?.remove();
      done.what.node.classList.remove('pe-dragged');
      root.querySelectorAll('.pe-over').forEach((n) => n.classList.remove('pe-over'));
      if (!done.on) return;
      const swallow = (click) => { click.stopPropagation(); click.preventDefault(); };      // the click that ends a drag is no click
      addEventListener('click', swallow, { capture: true });
      setTimeout(() => removeEventListener('click', swallow, { capture: true }), 0);
      if (!cancelled && done.lane && done.at !== null) drop(done.what, done.lane, done.at);
    }

    root.addEventListener('pointerdown', (e) => {
      if (e.button || drag) return;
      const what = source(e.target, e.pointerType);
      if (what) drag = { what, x: e.clientX, y: e.clientY, pointer: e.pointerId, on: false, at: null, lane: null };
    });
    const gone = new AbortController();
    const listen = (type, f) => document.addEventListener(type, (e) => (root.isConnected ? f(e) : gone.abort()), { signal: gone.signal, passive: false });
    listen('pointermove', follow);
    listen('pointerup', (e) => finish(e, false));
    listen('pointercancel', (e) => finish(e, true));
    listen('keydown', (e) => { if (e.key === 'Escape' && drag) finish({}, true); });
    return { get active() { return drag !== null && drag.on; } };
  };
})();
