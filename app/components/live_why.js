// Why a lane is as fast as it is: its step in parts, what its policies can touch, and the roofline.
(() => {
  const PS = window.ParetoStudio, { el, svg } = PS;
  const W = 420, H = 240, LEFT = 52, RIGHT = 14, TOP = 12, BOTTOM = 36;
  let chosen = '';  // device of the rooflines; empty = the one that ran

  PS.whyNotFaster = (place, data) => {
    if (!data?.phases?.length) { place.__shown = null; return place.replaceChildren(); }
    const open = new Set([...place.querySelectorAll('details[open]')].map((d) => d.dataset.why));
    const again = (id) => { PS.whyNotFaster(place, data); place.querySelector(`[data-phase="${id}"] .lw-device select`)?.focus(); };
    return PS.redraw(place, [data, chosen], () => [el('h3', { class: 'lw-title' }, 'Why not faster?'),
      el('p', { class: 'lr-summary' }, 'Where the time of a step goes, in a pass of its own after the race; the lengths of the bars are times.'),
      ...data.phases.map((phase) => figure(phase, data.kinds, open, again)), key(data.kinds)]);
  };

  const key = (kinds) => el('p', { class: 'lr-key lw-key' }, kinds.map((k) => el('span', {}, el('i', { class: `lw-part lw-${k.id}`, 'aria-hidden': 'true' }), k.title)));

  function figure(phase, kinds, open, again) {
    return el('figure', { class: 'lr-chart', 'data-phase': phase.id }, el('figcaption', {}, el('h4', {}, phase.title)),
      el('div', { class: 'lw-lanes' }, phase.lanes.map((lane) => el('section', { class: 'lw-lane', 'data-why-lane': lane.lane, style: `--lane:${lane.colour}`, 'aria-label': `${phase.title}, ${lane.name}` },
        el('div', { class: 'lr-name' }, PS.laneMark(lane), el('h5', {}, lane.name), el('span', { class: 'lw-time' }, lane.time), lane.ratio ? el('span', { class: 'lw-ratio' }, lane.ratio) : null),
        el('div', { class: 'lw-bar', role: 'img', 'aria-label': lane.label, style: `width:${(100 * lane.width).toFixed(2)}%` },
          lane.parts.filter((p) => p.share > 0.002).map((p) => el('span', { class: `lw-part lw-${p.kind}`, style: `flex-grow:${p.share.toFixed(4)}`, title: `${kinds.find((k) => k.id === p.kind).title}: ${(100 * p.share).toFixed(0)} %` }))),
        lane.sentences.length ? el('ul', { class: 'lw-said' }, lane.sentences.map((s) => el('li', {}, s))) : null))),
      phase.roofline ? roofline(phase, open, again) : null,
      table(`${phase.id}-parts`, 'Table of the parts', phase.table, open));
  }

  const table = (id, title, rows, open) => el('details', { 'data-why': id, open: open.has(id) }, el('summary', {}, title),
    el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': title }, PS.plainTable(rows)));

  const choice = (id, devices, again) => el('label', { class: 'lw-device' }, 'Limits of ', el('select', { on: { change: (e) => { chosen = e.target.value; again(id); } } },
    devices.map((d) => el('option', { value: d.id, selected: d.id === chosen }, d.title))));

  function roofline(phase, open, again) {
    const devices = phase.roofline.devices, r = devices.find((d) => d.id === chosen) || devices[0], xs = [r.ridge, ...r.points.map((p) => p.x)], ys = [r.peak, ...r.points.map((p) => p.y)];
    const lx0 = Math.floor(Math.log10(Math.min(...xs)) - 0.3), lx1 = Math.ceil(Math.log10(Math.max(...xs)) + 0.3), ly0 = Math.floor(Math.log10(Math.min(...ys)) - 0.2), ly1 = Math.ceil(Math.log10(Math.max(...ys)) + 0.05);
    const x = (v) => LEFT + (W - LEFT - RIGHT) * (Math.log10(v) - lx0) / (lx1 - lx0), y = (v) => H - BOTTOM - (H - TOP - BOTTOM) * (Math.log10(v) - ly0) / (ly1 - ly0);
    const text = (px, py, value, attrs) => svg('text', { x: px, y: py, class: 'lr-axis', ...attrs }, value);
    const plot = svg('svg', { viewBox: `0 0 ${W} ${H}`, class: 'lr-svg', role: 'img', 'aria-label': `Roofline. ${r.summary} ${r.points.map((p) => p.text).join('; ')}` });
    for (let e = ly0; e <= ly1; e++) plot.append(svg('line', { x1: LEFT, x2: W - RIGHT, y1: y(10 ** e), y2: y(10 ** e), class: 'lr-grid' }), text(LEFT - 6, y(10 ** e), power(e - 9), { 'text-anchor': 'end', 'dominant-baseline': 'central' }));
    for (let e = lx0; e <= lx1; e++) plot.append(svg('line', { x1: x(10 ** e), x2: x(10 ** e), y1: H - BOTTOM, y2: H - BOTTOM + 4, class: 'lr-grid' }), text(x(10 ** e), H - BOTTOM + 15, power(e), { 'text-anchor': 'middle' }));
    const low = Math.max(10 ** lx0, 10 ** ly0 / r.bandwidth);
    plot.append(svg('polyline', { class: 'lw-roof', points: [[low, low * r.bandwidth], [r.ridge, r.peak], [10 ** lx1, r.peak]].map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' ') }));
    plot.append(text((LEFT + W - RIGHT) / 2, H - 4, 'operations a byte', { 'text-anchor': 'middle' }), text(LEFT + 4, TOP + 4, 'billion operations a second', {}));
    for (const p of r.points) plot.append(svg('text', { x: x(p.x), y: y(p.y), class: 'lr-point', style: `fill:${p.colour}`, 'text-anchor': 'middle', 'dominant-baseline': 'central' }, p.mark, svg('title', {}, p.text)));
    return el('div', { class: 'lw-roofline' }, el('h5', {}, 'Under the roofline'), choice(phase.id, devices, again), el('p', { class: 'lr-summary' }, r.summary), el('div', { class: 'lr-plot' }, plot), table(`${phase.id}-roof`, 'Table of the roofline', r.table, open));
  }

  const power = (e) => (e >= -2 && e <= 4 ? String(Number((10 ** e).toPrecision(3))) : `1e${e}`);
})();
