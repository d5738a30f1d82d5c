// A cache under the microscope: a row a head, layer by layer, a column a position, at several moments of the answer.
(() => {
  const PS = window.ParetoStudio, { el, svg, button } = PS;
  const HIGH = 300, HIGHEST_ROW = 10, GAP = 1, WIDEST = 320, LONG = 1000, NEAR = 12, TICKS = 6, HIDDEN = 0.001, LOW = 120, BESIDE = 240, TALL = 640, FAINTEST = 0.35;

  /** Rows of bits, a row a head; each row is filled up to whole bytes. */
  const unpack = (frame) => {
    const text = atob(frame.held), bytes = Math.ceil(frame.positions / 8);
    return (row, column) => (text.charCodeAt(row * bytes + (column >> 3)) >> (7 - (column & 7))) & 1;
  };

  const rowsOf = (heads) => heads.flatMap((n, layer) => Array.from({ length: n }, (_, head) => ({ layer, head })));

  /** What a person set stays while the same item is shown: the moment, the view of the image, whether the table is open. */
  PS.cacheMicroscope = (place, data, images, src, wanted, choose) => {
    const lanes = data?.lanes || [];
    if (!lanes.length) { place.__shown = place.__set = null; return place.replaceChildren(); }
    const lane = lanes.find((l) => l.lane === wanted) || lanes[0];
    const had = document.activeElement?.closest?.('.lr-cache') === place ? document.activeElement.dataset.act : null;
    const seen = images?.item === data.item && images.boxes?.length && images.boxes.length === data.image.length ? images : null;
    if (place.__set?.item !== data.item) place.__set = { item: data.item, moment: Infinity, tiles: false, open: false };
    const drawn = PS.redraw(place, [data, lane.lane, seen && [seen.boxes, seen.views, Boolean(src)]], () => [view(data, lane, lanes, seen, src, place.__set, choose)]);
    if (drawn && had) place.querySelector(`[data-act="${had}"]`)?.focus();
  };

  function view(data, lane, lanes, images, src, set, choose) {
    const rows = rowsOf(lane.heads), total = lane.frames.at(-1).positions, prompt = lane.frames[0].positions, high = Math.max(1, Math.min(HIGHEST_ROW, Math.round(HIGH / rows.length)));
    const tabs = lanes.length < 2 ? '' : el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Lane under the microscope' }, lanes.map((l) => button([PS.laneMark(l), ` ${l.name}`], () => choose(l.lane), { class: 'pe-small', 'aria-pressed': String(l.lane === lane.lane), 'data-act': `lane ${l.lane}` })));
    const height = rows.length * high + (lane.heads.length - 1) * GAP, canvas = el('canvas', { width: total, height, class: `lc-map${height > TALL ? ' lc-fine' : ''}`, style: `color:${lane.colour};height:${Math.max(images ? BESIDE : LOW, Math.min(TALL, height))}px` });
    const cross = ['x', 'y'].map((side) => el('span', { class: `lc-cross lc-${side}`, hidden: true }));
    const at100 = (column) => `${100 * column / total}%`, from = total > prompt ? el('span', { class: 'lc-answer', style: `left:${at100(prompt)}` }) : '';
    const mark = data.marked.length ? el('span', { class: 'lc-marked', style: `left:${at100(data.marked[0])};width:${at100(data.marked[1] - data.marked[0])}` }) : '';
    const stage = el('div', { class: 'lc-stage', tabindex: 0, role: 'application', 'aria-label': `Cache of ${lane.name}: arrow keys move over heads and positions`, 'data-act': 'map' }, canvas, from, mark, cross);
    const about = el('p', { class: 'ps-quiet lc-about', 'aria-live': 'polite' }), needle = data.marked.length ? el('p', { class: 'lc-needle' }) : '';
    const patches = images ? patchPicture(data, lane, images, src, set, () => tell()) : null;
    const body = el('tbody', {});
    let frame = Math.min(set.moment, lane.frames.length - 1), at = null, held = null;

    const pixels = () => Math.min(total, Math.round(canvas.offsetWidth * devicePixelRatio) || total);  // where columns share one, it has their mean
    const top = (row) => row * high + rows[row].layer * GAP;
    const rowAt = (y) => { let row = 0; while (row + 1 < rows.length && top(row + 1) <= y) row += 1; return row; };
    const word = (column) => (column < data.pieces.length ? ` “${data.pieces[column].trim() || '␣'}”` : ', generated');

    function paint() {
      const now = lane.frames[frame], pen = canvas.getContext('2d');
      const across = pixels(), first = (x) => Math.floor(x * total / across);
      held = unpack(now);
      canvas.width = across;                                                  // which clears it
      pen.fillStyle = getComputedStyle(canvas).color;
      rows.forEach((r, row) => {
        const y = top(row), h = Math.max(1, high > 3 ? high - 1 : high);
        for (let x = 0; x < across; x += 1) {
          let sum = 0;
          const stop = Math.min(first(x + 1), now.positions);
          for (let column = first(x); column < stop; column += 1) sum += held(row, column);
          if (!sum) continue;
          const share = sum / (stop - first(x));
          pen.globalAlpha = share < 1 ? FAINTEST + (1 - FAINTEST) * share : 1;
          pen.fillRect(x, y, 1, h);
        }
      });
      if (needle) {
        needle.textContent = now.needle.text;
        [needle, mark].forEach((node) => node.classList.toggle('lc-lost', now.needle.lost));
        mark.title = now.needle.text;
      }
      table(now);
      tell();
    }

    function table(now) {
      const share = (list, first, stop) => { let sum = 0; for (const row of list) for (let x = first; x < stop; x += 1) sum += held(row, x); return stop > first && list.length ? `${(100 * sum / list.length / (stop - first)).toFixed(0)} %` : ''; };
      const lines = lane.heads.map((n, layer) => { const list = rows.flatMap((r, row) => (r.layer === layer ? [row] : [])); return [String(layer + 1), share(list, 0, now.positions), ...(data.marked.length ? [share(list, ...data.marked)] : [])]; });
      body.replaceChildren(...lines.map((cells) => el('tr', {}, cells.map((c, i) => el(i ? 'td' : 'th', { scope: i ? false : 'row', class: 'num' }, c)))));
    }

    function tell() {
      const now = lane.frames[frame];
      cross.forEach((line) => { line.hidden = !at; });
      patches?.draw((column) => (at ? held(at.row, column) : rows.reduce((sum, r, row) => sum + held(row, column), 0) / rows.length), at ? rows[at.row] : null);
      if (!at) { about.textContent = `${now.when}: ${rows.length} heads of ${lane.heads.length} layers, ${now.positions.toLocaleString('en')} positions`; return; }
      const { layer, head } = rows[at.row];
      cross[0].style.left = at100(at.column + 0.5);
      cross[1].style.top = `${100 * (top(at.row) + high / 2) / canvas.height}%`;
      const state = at.column >= now.positions ? 'not yet there' : held(at.row, at.column) ? 'held' : 'gone';
      about.textContent = `layer ${layer + 1}, head ${head + 1}, position ${at.column + 1}${word(at.column)}: ${state}`;
    }

    const move = (row, column) => { at = { row: Math.max(0, Math.min(rows.length - 1, row)), column: Math.max(0, Math.min(total - 1, column)) }; tell(); };
    const point = (e) => { const box = canvas.getBoundingClientRect(); move(rowAt((e.clientY - box.top) / box.height * canvas.height), Math.floor((e.clientX - box.left) / box.width * total)); };
    const leave = () => { at = null; tell(); };
    stage.addEventListener('pointermove', point);
    stage.addEventListener('pointerdown', (e) => { point(e); stage.focus({ preventScroll: true }); });  // a finger need not move, and what it found stays
    stage.addEventListener('pointerleave', () => { if (document.activeElement !== stage) leave(); });
    stage.addEventListener('blur', leave);
    stage.addEventListener('keydown', (e) => {
      if (e.key === 'Escape' && at) { e.preventDefault(); return leave(); }
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [-NEAR, 0], PageDown: [NEAR, 0], Home: [0, -total], End: [0, total] }[e.key];
      if (!step) return;
      e.preventDefault();
      if (at) move(at.row + step[0], at.column + step[1]); else move(0, data.marked[0] || 0);
    });
    new ResizeObserver(() => { if (held && canvas.width !== pixels()) paint(); }).observe(canvas);
    const slider = lane.frames.length < 2 ? '' : el('input', { type: 'range', min: 0, max: lane.frames.length - 1, step: 1, value: frame, 'aria-label': `Moment, ${lane.name}`, 'aria-valuetext': lane.frames[frame].when, 'data-act': 'moment' });
    const moment = el('output', { class: 'num' }, lane.frames[frame].when);
    if (slider) slider.addEventListener('input', () => { frame = set.moment = Number(slider.value); moment.textContent = lane.frames[frame].when; slider.setAttribute('aria-valuetext', moment.textContent); paint(); });
    canvas.__paint = paint;
    requestAnimationFrame(paint);                                             // its colour is known once it is on the page
    watchTheme();
    const ticks = lane.heads.map((n, layer) => layer).filter((layer) => layer % Math.ceil(lane.heads.length / TICKS) === 0);
    const axis = el('div', { class: 'lc-layers', 'aria-hidden': 'true' }, ticks.map((layer) => el('span', { style: `top:${100 * top(Math.max(0, rows.findIndex((r) => r.layer === layer))) / canvas.height}%` }, String(layer + 1))));
    const key = ['a row is a head, layers from the top down, numbered on the left', 'a column a position', 'coloured: held', total > WIDEST && 'paler: in part, where positions share a pixel', total > prompt && 'dotted line: the answer begins', data.marked.length && 'frame: the needle, broken where some of it is lost'];
    return el('figure', { class: 'lr-chart', style: `--lane:${lane.colour}` },
      el('figcaption', {}, el('h3', {}, `Cache under the microscope, ${data.place}`), el('p', { class: 'lr-summary' }, lane.summary)), tabs,
      slider ? el('div', { class: 'lc-moment' }, el('span', { 'aria-hidden': 'true' }, 'moment'), slider, moment) : '',
      el('div', { class: patches ? 'lc-pair' : '' }, el('div', {}, el('div', { class: 'lc-framed' }, axis, stage), about, needle), patches?.node || ''),
      el('p', { class: 'lr-key' }, key.filter(Boolean).join(' · ')),
      el('details', { open: set.open, on: { toggle: (e) => { set.open = e.target.open; } } }, el('summary', { 'data-act': 'table' }, 'Table'), el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': `Table of the cache of ${lane.name}` },
        el('table', {}, el('thead', {}, el('tr', {}, ['Layer', 'Held', ...(data.marked.length ? ['Needle held'] : [])].map((h, i) => el('th', { scope: 'col', class: 'num' }, h)))), body))));
  }

  /** The image under a veil where its patches are gone: from the head under the cursor, or from a share of all heads. */
  function patchPicture(data, lane, images, src, set, again) {
    const size = Math.max(images.width, images.height), w = LONG * images.width / size, h = LONG * images.height / size, veil = PS.uid('veil');
    const placed = images.boxes.map((box) => box.length === 4), whole = placed.some((p, i) => p && images.views[i] === 0), mixed = whole && placed.some((p, i) => p && images.views[i] > 0);
    const overlay = svg('svg', { viewBox: `0 0 ${w} ${h}`, preserveAspectRatio: 'none', role: 'img', class: 'li-overlay' }), caption = el('p', { class: 'li-caption' });
    overlay.append(PS.veil(veil));
    const cells = images.boxes.map((box, i) => {
      if (!placed[i]) return null;
      const [l, t, r, b] = box.map((v, side) => v / 10000 * (side % 2 ? h : w));
      return svg('rect', { x: l, y: t, width: Math.max(0, r - l), height: Math.max(0, b - t), class: 'li-cell', fill: `url(#${veil})`, 'data-patch': i });
    });
    overlay.append(...cells.filter(Boolean));
    const picture = el('img', { class: size < WIDEST ? 'li-coarse' : false, alt: `Picture of ${data.place}`, src: src || false, draggable: 'false' });
    const views = mixed ? el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Part of the image in the cache' }, [false, true].map((tiles) => button(tiles ? 'tiles' : 'whole image', () => { set.tiles = tiles; again(); }, { class: 'pe-small', 'data-tiles': tiles ? '1' : '0' }))) : '';
    return {
      node: el('div', { class: 'lc-image', style: `width:${Math.round(WIDEST * images.width / size)}px` }, views, el('div', { class: 'li-stage', style: `aspect-ratio:${images.width} / ${images.height}` }, picture, overlay), caption),
      draw(share, one) {
        const tiles = mixed ? set.tiles : !whole;
        let sum = 0, n = 0, gone = 0;
        cells.forEach((cell, i) => {
          if (!cell) return;
          const shown = (images.views[i] > 0) === tiles, s = shown ? share(data.image[i]) : 1;
          cell.style.display = shown && s < 1 - HIDDEN ? '' : 'none';
          cell.setAttribute('fill-opacity', (1 - s).toFixed(3));
          cell.dataset.held = s.toFixed(3);
          if (shown) { sum += s; n += 1; gone += s < HIDDEN; }
        });
        if (views) views.querySelectorAll('button').forEach((b) => b.setAttribute('aria-pressed', String((b.dataset.tiles === '1') === tiles)));
        const what = mixed ? `patches of the ${tiles ? 'tiles' : 'whole image'}` : 'patches of the image';
        caption.textContent = one ? `layer ${one.layer + 1}, head ${one.head + 1} holds ${sum} of ${n} ${what}` : `${what}: ${(100 * sum / Math.max(1, n)).toFixed(0)} % held, mean of all heads; ${gone ? `${gone} of ${n} gone` : `none of ${n} is gone`} from every head`;
        overlay.setAttribute('aria-label', `${lane.name}: ${caption.textContent}`);
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
