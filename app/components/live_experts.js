// How experts share the tokens: layers from top to bottom, experts from left to right, one map a lane.
(() => {
  const PS = window.ParetoStudio, { el } = PS;
  const WIDE = 560, HIGH = 320, FAINTEST = 0.06, clamp = (v, low, high) => Math.max(low, Math.min(high, Math.round(v)));

  PS.expertLoad = (place, data) => {
    const lanes = data?.lanes || [];
    if (!lanes.length) { place.__shown = null; return place.replaceChildren(); }
    repaint();
    const open = new Set([...place.querySelectorAll('details[open]')].map((d) => d.dataset.lane));
    return PS.redraw(place, data, () => [el('figure', { class: 'lr-chart' }, el('figcaption', {}, el('h3', {}, `Expert load, ${data.place}`),
      el('p', { class: 'lr-summary' }, 'a row is a layer, a column an expert; the stronger the colour, the more of the layer\'s tokens visited it')),
    el('div', { class: 'li-panels' }, lanes.map((lane) => panel(lane, data, open.has(String(lane.lane))))),
    el('p', { class: 'lr-key' }, `strongest colour: ${percent(data.most, data)} of a layer's tokens · dot: no token`))]);
  };

  /** The ink of the baseline is another one in the other theme. */
  let theme = null;
  const repaint = () => {
    theme = theme || new MutationObserver(() => document.querySelectorAll('.lx-map').forEach((map) => map.__paint()));
    theme.observe(document.body, { attributes: true, attributeFilter: ['class'] });
  };

  const percent = (share, data) => `${Number((100 * share / data.scale).toPrecision(3))} %`;

  function panel(lane, data, open) {
    const experts = Math.max(...lane.layers.map((l) => l.shares.length)), w = clamp(WIDE / experts, 3, 28), h = clamp(HIGH / lane.layers.length, 5, 18);
    const map = el('canvas', { class: 'lx-map', width: experts * w, height: lane.layers.length * h, role: 'img', 'aria-label': `Expert load, ${lane.name}: ${lane.summary}`, style: `color:${lane.colour}` });
    const about = el('p', { class: 'ps-quiet lx-about' }), usual = `${lane.layers.length === 1 ? `layer ${lane.layers[0].layer}` : `layers ${lane.layers[0].layer} to ${lane.layers.at(-1).layer}`}, experts 1 to ${experts}`;
    about.textContent = usual;
    map.addEventListener('pointermove', (e) => {
      const box = map.getBoundingClientRect(), layer = lane.layers[Math.floor((e.clientY - box.top) / box.height * lane.layers.length)], n = Math.floor((e.clientX - box.left) / box.width * experts);
      about.textContent = layer?.shares[n] === undefined ? usual : `layer ${layer.layer}, expert ${n + 1}: ${percent(layer.shares[n], data)} of its tokens`;
    });
    map.addEventListener('pointerleave', () => { about.textContent = usual; });
    map.__paint = () => paint(map, lane.layers, w, h, data.most);
    requestAnimationFrame(map.__paint);                                                 // its colour is known once it is on the page
    const rows = lane.layers.map((l) => { const top = Math.max(...l.shares); return [String(l.layer), `${l.carry} of ${l.shares.length}`, `${l.shares.indexOf(top) + 1} (${percent(top, data)})`, String(l.shares.filter((s) => !s).length)]; });
    return el('section', { class: 'li-panel', 'data-experts': lane.lane, style: `--lane:${lane.colour}`, 'aria-label': `Experts, ${lane.letter ? `lane ${lane.letter}` : 'baseline'}` },
      el('div', { class: 'lr-name' }, PS.laneMark(lane), el('h4', {}, lane.name)), map, about, el('p', { class: 'li-caption' }, lane.summary),
      el('details', { 'data-lane': lane.lane, open }, el('summary', {}, 'Table'), el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': `Table of the experts of ${lane.name}` },
        PS.plainTable({ head: ['Layer', 'Carry 90 %', 'Busiest', 'Without a token'], rows }))));
  }

  function paint(map, layers, w, h, most) {
    const pen = map.getContext('2d'), gap = w > 5 ? 1 : 0, dot = w > 7 ? 2 : 1;
    pen.clearRect(0, 0, map.width, map.height);
    pen.fillStyle = getComputedStyle(map).color;
    layers.forEach((layer, y) => layer.shares.forEach((share, x) => {
      pen.globalAlpha = share ? FAINTEST + (1 - FAINTEST) * share / most : 0.6;
      if (share) pen.fillRect(x * w, y * h, w - gap, h - 1);
      else pen.fillRect(x * w + Math.floor((w - gap - dot) / 2), y * h + Math.floor((h - dot) / 2), dot, dot);
    }));
  }
})();
