// Live charts as SVG, drawn from plain data. Every chart has a sentence and a table beside it.
(() => {
  const PS = window.ParetoStudio, { el, svg } = PS;
  const H = 220, LEFT = 46, RIGHT = 12, TOP = 10, BOTTOM = 34;

  /** Round steps of an axis: about `count` of them between low and high. */
  PS.ticks = (low, high, count) => {
    const span = high - low || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const out = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) out.push(Number(v.toPrecision(12)));
    return out;
  };

  const number = (v) => (Math.abs(v) >= 1000 ? v.toLocaleString('en') : String(Number(v.toPrecision(4))));

  /** One chart as a figure; `figure` from the last call is reused, so that an open table stays open. */
  PS.chart = (chart, old) => {
    const figure = old || el('figure', { class: 'lr-chart', 'data-chart': chart.id }, el('figcaption', {}, el('h3', {}), el('p', { class: 'lr-summary' })), el('div', { class: 'lr-plot' }), el('div', { class: 'lr-legend' }),
      el('details', {}, el('summary', {}, 'Table'), el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': `Table of ${chart.title}` })));
    figure.querySelector('h3').textContent = chart.title;
    figure.querySelector('.lr-summary').textContent = chart.summary;
    const width = Math.max(260, Math.min(640, figure.querySelector('.lr-plot').clientWidth || 420));      // drawn at true size, so that text keeps its own
    const plot = chart.kind === 'ratios' ? ratioPlot(chart, width) : linePlot(chart, width);
    plot.setAttribute('role', 'img');
    plot.setAttribute('aria-label', `${chart.title}. ${chart.summary}`);
    figure.querySelector('.lr-plot').replaceChildren(plot);
    figure.querySelector('.lr-legend').replaceChildren(...legend(chart));
    figure.querySelector('.lr-scroll').replaceChildren(PS.plainTable(chart.table));
    figure.dataset.updates = String(Number(figure.dataset.updates || 0) + 1);
    return figure;
  };

  PS.plainTable = ({ head, rows }) => el('table', { class: 'lr-plain' },
    el('thead', {}, el('tr', {}, head.map((h, i) => el('th', { scope: 'col', class: i ? 'num' : '' }, h)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((cell, i) => el(i ? 'td' : 'th', { scope: i ? false : 'row', class: i ? 'num' : '' }, cell))))));

  function legend(chart) {
    const seen = new Map();
    for (const s of chart.series || (chart.rows || []).flatMap((r) => r.marks)) seen.set(s.lane, s);
    return [...seen.values()].sort((a, b) => a.lane - b.lane).map((s) => el('span', {}, PS.laneMark(s), s.name));
  }

  const text = (x, y, value, attrs) => svg('text', { x, y, class: 'lr-axis', ...attrs }, value);
  const mark = (x, y, s, title) => svg('text', { x, y, class: 'lr-point', style: `fill:${s.colour}`, 'text-anchor': 'middle', 'dominant-baseline': 'central' }, s.mark, title ? svg('title', {}, title) : null);

  function linePlot(chart, W) {
    const points = chart.series.flatMap((s) => s.points);
    const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    const x0 = Math.min(0, ...xs), x1 = Math.max(...xs, x0 + 1e-9), y0 = chart.id === 'race' ? 0 : Math.min(...ys, 0), y1 = Math.max(...ys, y0 + 1e-9) * 1.04;
    const x = (v) => LEFT + (W - LEFT - RIGHT) * (v - x0) / (x1 - x0), y = (v) => H - BOTTOM - (H - TOP - BOTTOM) * (v - y0) / (y1 - y0);
    const plot = svg('svg', { viewBox: `0 0 ${W} ${H}`, class: 'lr-svg' });
    for (const t of PS.ticks(y0, y1, 4)) plot.append(svg('line', { x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t), class: 'lr-grid' }), text(LEFT - 6, y(t), number(t), { 'text-anchor': 'end', 'dominant-baseline': 'central' }));
    for (const t of PS.ticks(x0, x1, 5).filter((v) => chart.id !== 'items' || Number.isInteger(v))) plot.append(svg('line', { x1: x(t), x2: x(t), y1: H - BOTTOM, y2: H - BOTTOM + 4, class: 'lr-grid' }), text(x(t), H - BOTTOM + 15, number(t), { 'text-anchor': 'middle' }));
    plot.append(text((LEFT + W - RIGHT) / 2, H - 3, chart.x, { 'text-anchor': 'middle' }), text(LEFT + 4, TOP + 8, chart.y, {}));
    for (const s of chart.series) {
      plot.append(svg('polyline', { class: 'lr-line', style: `stroke:${s.colour}`, points: s.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' ') }));
      const last = s.points[s.points.length - 1];
      plot.append(mark(x(last[0]), y(last[1]), s, `${s.name}: ${number(last[1])} ${chart.y}`));
    }
    return plot;
  }

  function ratioPlot(chart, W) {
    const each = 16, gap = 16, height = TOP + BOTTOM + 4 + chart.rows.reduce((sum, row) => sum + gap + each * row.marks.length, 0);
    const values = chart.rows.flatMap((r) => r.marks.flatMap((m) => [m.value, m.low ?? m.value, m.high ?? m.value])).filter((v) => v > 0);
    const low = Math.min(0.8, ...values) * 0.92, high = Math.max(1.25, ...values) * 1.08;
    const x = (v) => 8 + (W - 62) * (Math.log(v) - Math.log(low)) / (Math.log(high) - Math.log(low));
    const plot = svg('svg', { viewBox: `0 0 ${W} ${height}`, class: 'lr-svg' });
    const steps = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].filter((v) => v >= low && v <= high);
    for (const t of steps) plot.append(svg('line', { x1: x(t), x2: x(t), y1: TOP, y2: height - BOTTOM, class: t === 1 ? 'lr-one' : 'lr-grid' }), text(x(t), height - BOTTOM + 14, `${t}×`, { 'text-anchor': 'middle' }));
    plot.append(text(W / 2, height - 4, chart.x, { 'text-anchor': 'middle' }));
    let y = TOP;
    for (const row of chart.rows) {
      plot.append(text(8, y + 10, row.better ? `${row.title}, ${row.better}` : row.title, { class: 'lr-axis lr-strong' }));
      y += gap;
      for (const m of row.marks) {
        y += each;
        const at = y - each / 2;
        if (m.low !== null && m.high !== null) plot.append(svg('line', { x1: x(m.low), x2: x(m.high), y1: at, y2: at, class: 'lr-range', style: `stroke:${m.colour}` }));
        plot.append(mark(x(m.value), at, m, `${m.name}: ${m.text}`), text(W - 4, at, m.text, { 'text-anchor': 'end', 'dominant-baseline': 'central', class: 'lr-axis lr-strong' }));
      }
    }
    return plot;
  }
})();
