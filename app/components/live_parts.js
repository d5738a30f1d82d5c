// Columns, texts, eviction map and table of a race. They draw what Python sends, as text nodes.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const SIGNS = { better: '▲', worse: '▼', 'no clear difference': '≈', same: '=' };

  /** The status line, built once per run; fillHead writes into it. */
  PS.raceHead = (h, cancel) => [
    el('div', { class: 'lr-headline' }, el('span', {}), el('span', { class: 'lr-title' }), el('span', { class: 'ps-quiet num lr-clock' }),
      !h.over && h.mine ? button('Cancel', cancel, { class: 'ps-button lr-cancel' }) : '', !h.over && !h.mine ? el('span', { class: 'ps-quiet' }, 'started by someone else') : ''),
    el('progress', { max: 1, 'aria-label': 'Progress of the run' }), el('div', { class: 'lr-notes' })];
  PS.fillHead = (place, h, connection) => {
    const [state, title, clock] = place.querySelectorAll('.lr-headline > span'), bar = place.querySelector('progress');
    state.className = `lr-state lr-state-${h.status}`;
    state.textContent = h.text;
    title.textContent = h.title || '';
    clock.textContent = [h.elapsed, h.eta].filter(Boolean).join(' · ');
    const done = h.over ? 1 : h.done;
    if (done === null || done === undefined) bar.removeAttribute('value'); else bar.value = done;
    PS.redraw(place.querySelector('.lr-notes'), [h.message, h.notes, connection], () => [
      h.message ? el('p', { class: `ps-note ps-note-${h.status === 'failed' ? 'error' : 'info'}`, role: 'alert' }, h.message) : '',
      connection === 'lost' ? el('p', { class: 'ps-note ps-note-warning' }, 'The connection to the studio is interrupted; trying again.') : '',
      (h.notes || []).map((n) => el('p', { class: 'ps-note ps-note-info' }, n))]);
  };

  /** One column per lane; the text inside is filled by laneTexts and survives a redraw of the numbers. */
  PS.laneColumns = (place, data) => {
    const lanes = data.lanes || [];
    if (place.children.length !== lanes.length) place.replaceChildren(...lanes.map(newColumn));
    const compared = new Set(lanes.flatMap((lane) => lane.rows.filter((row) => row.ratio).map((row) => row.name)));
    lanes.forEach((lane, i) => fillColumn(place.children[i], lane, compared));
  };

  const newColumn = (lane) => el('section', { class: 'lr-lane', 'data-lane-index': lane.lane, 'aria-label': `Race, ${lane.letter ? `lane ${lane.letter}` : 'baseline'}`, style: `--lane:${lane.colour}` },
    el('header', {}), el('div', { class: 'lr-now' }), el('dl', { class: 'lr-rows' }), el('div', { class: 'lr-memory' }), el('div', { class: 'lr-text' }), el('div', { class: 'lr-flags' }));

  /** compared: metrics that have a ratio in some lane; the others keep its line free, so that rows stand side by side. */
  function fillColumn(node, lane, compared) {
    node.style.setProperty('--lane', lane.colour);
    node.classList.toggle('lr-active', lane.active);
    node.querySelector('header').replaceChildren(
      el('div', { class: 'lr-name' }, PS.laneMark(lane), el('h3', {}, lane.name)),
      el('div', { class: 'ps-quiet lr-steps' }, lane.steps.toLowerCase() === lane.name.toLowerCase() ? '' : lane.steps),
      el('div', { class: 'ps-quiet' }, [lane.status, lane.items].filter(Boolean).join(' · ')));
    node.querySelector('.lr-now').replaceChildren(
      el('span', { class: 'lr-big num' }, lane.now ? lane.now.text : '–'), el('span', { class: 'lr-unit' }, lane.now?.unit || ''), el('span', { class: 'ps-quiet' }, lane.now?.when || ''));
    node.querySelector('.lr-rows').replaceChildren(...lane.rows.map((row) => metricRow(row, compared.has(row.name))));
    node.querySelector('.lr-memory').replaceChildren(...lane.memory.map((m) => el('div', { class: 'lr-bar' },
      el('span', {}, m.title), el('span', { class: 'lr-track', 'aria-hidden': 'true' }, el('span', { class: 'lr-fill', style: `width:${(100 * m.share).toFixed(1)}%` })),
      el('span', { class: 'num' }, `${m.text} ${m.unit}`), el('span', { class: 'num lr-ratio' }, m.ratio))));
    node.querySelector('.lr-flags').replaceChildren(...[lane.message, ...lane.flags].filter(Boolean).map((f) => el('p', { class: 'ps-note ps-note-warning' }, f)));
  }

  const metricRow = (row, compared) => el('div', { class: 'lr-row', 'data-metric': row.name, title: row.help },
    el('dt', {}, row.title, row.source !== 'measured' ? el('span', { class: 'ps-quiet' }, ` (${row.source})`) : ''),
    el('dd', { class: 'num' }, el('span', { class: 'lr-value' }, row.text), el('span', { class: 'lr-unit' }, row.unit)),
    row.ratio ? el('dd', { class: 'num lr-against' }, sign(row.verdict), ` ${row.ratio}`, row.interval ? el('span', { class: 'ps-quiet' }, ` ${row.interval}`) : '') : compared ? el('dd', { class: 'lr-against', 'aria-hidden': 'true' }, '\u00a0') : '');

  const sign = (verdict) => (SIGNS[verdict] ? el('span', { class: 'lr-sign', role: 'img', 'aria-label': verdict, title: verdict }, SIGNS[verdict]) : '');

  /** The text of each lane for the item in view, differences to the reference marked. */
  PS.laneTexts = (place, picker, data, choose, chosen, store) => {
    const s = data.streams;
    place.classList.toggle('lr-drawing', Boolean(s?.drawing));
    for (const node of place.children) {
      const mine = s?.lanes?.find((l) => l.lane === Number(node.dataset.laneIndex)), box = node.querySelector('.lr-text');
      box.classList.toggle('lr-short', Boolean(mine?.short));
      if (!mine) { box.replaceChildren(); continue; }
      if (mine.drawn) { PS.drawnColumn(box, mine, store, data.lanes?.[mine.lane]?.name || `lane ${mine.lane}`); continue; }
      if (mine.bars?.length) {
        const src = store.source(mine.item);
        PS.redraw(box, [mine, Boolean(src)], () => [PS.classBars(mine, src), el('p', { class: 'ps-quiet' }, judged(mine))]);
        continue;
      }
      delete box.__shown;
      const out = el('p', { class: `lr-out${mine.live ? ' lr-typing' : ''}`, tabindex: 0, role: 'group', 'aria-label': 'Output' }, mine.runs.map(([text, kind]) => (kind === 'same' ? text : el(kind === 'added' ? 'mark' : 'del', { title: kind === 'added' ? 'not in the baseline' : 'only in the baseline' }, text))));
      box.replaceChildren(out, el('p', { class: 'ps-quiet' }, judged(mine)));
      if (mine.live) out.scrollTop = out.scrollHeight;
    }
    PS.itemPicker(picker, s, choose, chosen);
  };

  const judged = (mine) => [mine.earlier, mine.live && !mine.runs.length ? 'reading the prompt…' : '', mine.correct === true ? '✓ right' : mine.correct === false ? '✗ wrong' : '', mine.expected && mine.correct === false ? `expected: ${mine.expected}` : '', mine.note].filter(Boolean).join(' · ');

  PS.itemPicker = (place, s, choose, chosen) => {
    const choices = s?.choices || [];
    if (choices.length < 2) { PS.redraw(place, null, () => []); return; }
    const at = choices.findIndex((c) => c.id === s.item), go = (i) => choose(choices[i].id);
    const had = document.activeElement?.closest?.('.lr-picker') === place ? document.activeElement.dataset.act : null;
    const drawn = PS.redraw(place, [at, choices.length, choices[at], chosen], () => [
      button('‹', () => go(at - 1), { class: 'pe-icon', disabled: at <= 0, 'aria-label': 'Previous item', 'data-act': 'previous' }),
      el('span', { class: 'num' }, `Item ${choices[at]?.label || ''}`),
      button('›', () => go(at + 1), { class: 'pe-icon', disabled: at < 0 || at >= choices.length - 1, 'aria-label': 'Next item', 'data-act': 'next' }),
      chosen ? button('Follow the run', () => choose(null), { class: 'pe-small', 'data-act': 'follow' }) : el('span', { class: 'ps-quiet' }, 'following the run')]);
    if (drawn && had) (place.querySelector(`[data-act=${had}]:not([disabled])`) || place.querySelector('button:not([disabled])'))?.focus();
  };

  /** The prompt, each token shaded by the share of the cache that still holds it. */
  PS.evictionMap = (place, kept, wanted, choose) => {
    const lanes = (kept?.lanes || []).filter((l) => l.share.length);
    if (!lanes.length || !kept.pieces.length) return place.replaceChildren();
    const lane = lanes.find((l) => l.lane === wanted) || lanes.find((l) => l.share.some((s) => s < 1)) || lanes[0];
    const tabs = el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Lane of the map' }, lanes.map((l) => button([PS.laneMark(l), ` ${l.name}`], () => choose(l.lane), { class: 'pe-small', 'aria-pressed': String(l.lane === lane.lane) })));
    const pieces = kept.pieces.map((piece, i) => {
      const share = lane.share[i] ?? 1;
      return el('span', { class: share === 0 ? 'lr-gone' : 'lr-piece', style: share > 0 ? `--share:${(100 * share).toFixed(0)}%` : false, title: `${(100 * share).toFixed(0)} % kept` }, piece);
    });
    const open = place.querySelector('details')?.open;
    place.replaceChildren(el('figure', { class: 'lr-chart lr-map', style: `--lane:${lane.colour}` },
      el('figcaption', {}, el('h3', {}, 'Eviction map: what is left of the prompt'), el('p', { class: 'lr-summary' }, lane.summary)), tabs,
      el('p', { class: 'lr-pieces', tabindex: 0, role: 'region', 'aria-label': 'Prompt with kept tokens' }, pieces),
      el('p', { class: 'lr-key' }, el('span', { class: 'lr-piece', style: '--share:100%' }, 'kept everywhere'), ' ', el('span', { class: 'lr-piece', style: '--share:35%' }, 'kept by some heads'), ' ', el('span', { class: 'lr-gone' }, 'gone')),
      el('details', { open }, el('summary', {}, 'Table'), el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': 'Table of kept tokens' }, PS.plainTable({ head: ['Token', 'Position', 'Kept'], rows: kept.pieces.map((p, i) => [p, String(i), `${(100 * (lane.share[i] ?? 1)).toFixed(0)} %`]) })))));
  };

  /** All metrics of all lanes. */
  PS.raceTable = (place, table) => {
    if (!table?.rows?.length) return place.replaceChildren();
    const head = el('tr', {}, el('th', { scope: 'col' }, 'Metric'), table.columns.map((c) => el('th', { scope: 'col', class: 'num', style: `--lane:${c.colour}` }, PS.laneMark(c), ` ${c.name}`)));
    let group = '';
    const rows = table.rows.flatMap((row) => {
      const title = row.group !== group ? [el('tr', { class: 'lr-group' }, el('th', { colspan: table.columns.length + 1, scope: 'rowgroup' }, row.group))] : [];
      group = row.group;
      return [...title, el('tr', { 'data-metric': row.name }, el('th', { scope: 'row', title: row.help }, row.title), row.cells.map(cell))];
    });
    place.replaceChildren(el('figure', { class: 'lr-chart lr-results' }, el('figcaption', {}, el('h3', {}, 'Results'), el('p', { class: 'lr-summary' }, `Ratios are lane over ${table.reference.toLowerCase()}, with 95 % intervals from interleaved pairs.`)),
      el('div', { class: 'lr-scroll', tabindex: 0, role: 'region', 'aria-label': 'Results' }, el('table', {}, el('thead', {}, head), el('tbody', {}, rows)))));
  };

  const cell = (c) => (c ? el('td', { class: 'num' }, el('span', { class: 'lr-value' }, c.text), el('span', { class: 'lr-unit' }, c.unit),
    c.source !== 'measured' ? el('span', { class: 'ps-quiet' }, ` ${c.source}`) : '', c.ratio ? el('div', { class: 'lr-against' }, sign(c.verdict), ` ${c.ratio}`, c.interval ? el('span', { class: 'ps-quiet' }, ` ${c.interval}`) : '') : '') : el('td', { class: 'num ps-quiet' }, '–'));
})();
