// A cache under the microscope: a row a head, layer by layer, a column a position, at several moments of the answer.
(() => {
  const PS = window.ParetoStudio, { el, svg, button } = PS;
  const HIGH = 300, HIGHEST_ROW = 10, GAP = 1, WIDE = 224, LONG = 1000, NEAR = 12;

  /** Rows of bits, a row a head; each row is filled up to whole bytes. */
  const unpack = (frame) => {
    const text = atob(frame.held), bytes = Math.ceil(frame.positions / 8);
    return (row, column) => (text.charCodeAt(row * bytes + (column >> 3)) >> (7 - (column & 7))) & 1;
  };

  const rowsOf = (heads) => heads.flatMap((n, layer) => Array.from({ length: n }, (_, head) => ({ layer, head })));

  PS.cacheMicroscope = (place, data, images, wanted, choose) => {
    const lanes = data?.lanes || [];
    if (!lanes.length) { place.__shown = null; return place.replaceChildren(); }
    const lane = lanes.find((l) => l.lane === wanted) || lanes[0];
    const had = document.activeElement?.closest?.('.lr-cache') === place ? document.activeElement.dataset.act : null;
    const seen = images?.item === data.item && images.boxes?.length === data.image.length ? images : null;
    const drawn = PS.redraw(place, [data, lane.lane, seen && [seen.boxes, seen.views]], () => [view(data, lane, lanes, seen, choose)]);
    if (drawn && had) place.querySelector(`[data-act="${had}"]`)?.focus();
  };

  function view(data, lane, lanes, images, choose) {
    const rows = rowsOf(lane.heads), total = lane.frames.at(-1).positions, high = Math.max(1, Math.min(HIGHEST_ROW, Math.round(HIGH / rows.length)));
    const tabs = lanes.length < 2 ? '' : el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Lane under the microscope' }, lanes.map((l) => button([PS.laneMark(l), ` ${l.name}`], () => choose(l.lane), { class: 'pe-small', 'aria-pressed': String(l.lane === lane.lane), 'data-act': `lane ${l.lane}` })));
    const canvas = el('canvas', { width: total, height: rows.length * high + (lane.heads.length - 1) * GAP, class: 'lc-map', style: `color:${lane.colour}` });
    const cross = ['x', 'y'].map((side) => el('span', { class: `lc-cross lc-${side}`, hidden: true }));
    const mark = data.marked.length ? el('span', { class: 'lc-marked', style: `left:${100 * data.marked[0] / total}%;width:${100 * (data.marked[1] - data.marked[0]) / total}%`, title: 'the needle' }) : '';
    const stage = el('div', { class: 'lc-stage', tabindex: 0, role: 'application', 'aria-label': `Cache of ${lane.name}: arrow keys move over heads and positions`, 'data-act': 'map' }, canvas, mark, cross);
    const about = el('p', { class: 'ps-quiet lc-about', 'aria-live': 'polite' }), patches = images ? patchPicture(data, images) : null;
    const body = el('tbody', {});
    let frame = lane.frames.length - 1, at = null, held = null;

    const top = (row) => row * high + rows[row].layer * GAP;
    const rowAt = (y) => { let row = 0; while (row + 1 < rows.length && top(row + 1) <= y) row += 1; return row; };
    const word = (column) => (column < data.pieces.length ? ` “${data.pieces[column].trim() || '␣'}”` : ', generated');

    function paint() {
      const now = lane.frames[frame], pen = canvas.getContext('2d');
      held = unpack(now);
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.fillStyle = getComputedStyle(canvas).color;
      rows.forEach((r, row) => {
        const y = top(row), h = Math.max(1, high > 3 ? high - 1 : high);
        for (let x = 0; x < now.positions; x += 1) {
          let stop = x;
          while (stop < now.positions && held(row, stop)) stop += 1;
          if (stop > x) { pen.fillRect(x, y, stop - x, h); x = stop; }
        }
      });
      table(now);
      tell();
    }

    function table(now) {
      const share = (list, from, to) => { let sum = 0; for (const row of list) for (let x = from; x < to; x += 1) sum += held(row, x); return to > from && list.length ? `${(100 * sum / list.length / (to - from)).toFixed(0)} %` : ''; };
      const lines = lane.heads.map((n, layer) => { const list = rows.flatMap((r, row) => (r.layer === layer ? [row] : [])); return [String(layer + 1), share(list, 0, now.positions), ...(data.marked.length ? [share(list, ...data.marked)] : [])]; });
      body.replaceChildren(...lines.map((cells) => el('tr', {}, cells.map((c, i) => el(i ? 'td' : 'th', { scope: i ? false : 'row', class: 'num' }, c)))));
    }

    function tell() {
      const now = lane.frames[frame];
      cross.forEach((line) => { line.hidden = !at; });
      patches?.draw((column) => (at ? held(at.row, column) : rows.reduce((sum, r, row) => sum + held(row, column), 0) / rows.length), at ? rows[at.row] : null);
      if (!at) { about.textContent = `${now.when}: ${rows.length} heads of ${lane.heads.length} layers, ${now.positions.toLocaleString('en')} positions`; return; }
      const { layer, head } = rows[at.row];
      cross[0].style.left = `${100 * (at.column + 0.5) / total}%`;
      cross[1].style.top = `${100 * (top(at.row) + high / 2) / canvas.height}%`;
      const state = at.column >= now.positions ? 'not yet there' : held(at.row, at.column) ? 'held' : 'gone';
      about.textContent = `layer ${layer + 1}, head ${head + 1}, position ${at.column + 1}${word(at.column)}: ${state}`;
    }

    const move = (row, column) => { at = { row: Math.max(0, Math.min(rows.length - 1, row)), column: Math.max(0, Math.min(total - 1, column)) }; tell(); };
    stage.addEventListener('pointermove', (e) => { const box = canvas.getBoundingClientRect(); move(rowAt((e.clientY - box.top) / box.height * canvas.height), Math.floor((e.clientX - box.left) / box.width * total)); });
    stage.addEventListener('pointerleave', () => { if (document.activeElement !== stage) { at = null; tell(); } });
    stage.addEventListener('blur', () => { at = null; tell(); });
    stage.addEventListener('keydown', (e) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-NEAR, 0], PageDown: [NEAR, 0], Home: [0, -total], End: [0, total] }[e.key];
      if (!step) return;
      e.preventDefault();
      if (at) move(at.row + step[0], at.column + step[1]); else move(0, data.marked[0] || 0);
    });
    const slider = lane.frames.length < 2 ? '' : el('input', { type: 'range', min: 0, max: frame, step: 1, value: frame, 'aria-label': `Moment, ${lane.name}`, 'aria-valuetext': lane.frames[frame].when, 'data-act': 'moment' });
    const moment = el('output', { class: 'num' }, lane.frames[frame].when);
    if (slider) slider.addEventListener('input', () => { frame = Number(slider.value); moment.textContent = lane.frames[frame].when; slider.setAttribute('aria-valuetext', moment.textContent); paint(); });
    canvas.__paint = paint;
    requestAnimationFrame(paint);                                             // its colour is known once it is on the page
    watchTheme();
    return el('figure', { class: 'lr-chart', style: `--lane:${lane.colour}` },
      el('figcaption', {}, el('h3', {}, `Cache under the microscope, ${data.place}`), el('p', { class: 'lr-summary' }, lane.summary)), tabs,
      slider ? el('div', { class: 'lc-moment' }, el('span', { 'aria-hidden': 'true' }, 'moment'), slider, moment) : '',
      el('div', { class: patches ? 'lc-pair' : '' }, el('div', {}, stage, about), patches?.node || ''),
      el('p', { class: 'lr-key' }, `a row is a head, from the first layer down; a column a position; coloured: held${data.marked.length ? ' · outlined: the needle' : ''}`),
      el('details', {}, el('summary', {}, 'Table'), el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': `Table of the cache of ${lane.name}` },
        el('table', {}, el('thead', {}, el('tr', {}, ['Layer', 'Held', ...(data.marked.length ? ['Needle held'] : [])].map((h) => el('th', { scope: 'col' }, h)))), body))));
  }

  /** The patches of the image that are still held, by all heads on average or by the one under the cursor. */
  function patchPicture(data, images) {
    const size = Math.max(images.width, images.height), w = LONG * images.width / size, h = LONG * images.height / size, whole = images.views.some((v) => v === 0);
    const overlay = svg('svg', { viewBox: `0 0 ${w} ${h}`, role: 'img', class: 'lc-patches' }), caption = el('p', { class: 'li-caption' });
    const cells = images.boxes.map((box, i) => {
      if (box.length !== 4 || (whole && images.views[i] > 0)) return null;
      const [l, t, r, b] = box.map((v, side) => v / 10000 * (side % 2 ? h : w));
      return svg('rect', { x: l, y: t, width: Math.max(0, r - l), height: Math.max(0, b - t), class: 'lc-patch', 'data-patch': i });
    });
    overlay.append(...cells.filter(Boolean));
    return {
      node: el('div', { style: `width:${WIDE}px;max-width:100%` }, overlay, caption),
      draw(share, one) {
        let sum = 0, n = 0;
        cells.forEach((cell, i) => { const s = share(data.image[i]); if (cell) { cell.setAttribute('fill-opacity', s.toFixed(3)); sum += s; n += 1; } });
        const whose = one ? `layer ${one.layer + 1}, head ${one.head + 1}` : 'mean of all heads';
        caption.textContent = `patches of the image, ${whose}: ${(100 * sum / Math.max(1, n)).toFixed(0)} % held`;
        overlay.setAttribute('aria-label', caption.textContent);
      },
    };
  }

  /** The ink of the baseline is another one in the other theme. */
  let theme = null;
  const watchTheme = () => {
    theme = theme || new MutationObserver(() => document.querySelectorAll('.lc-map').forEach((map) => map.__paint()));
    theme.observe(document.body, { attributes: true, attributeFilter: ['class'] });
  };
})();
