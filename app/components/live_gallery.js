// All pictures of a race as a grid: marks of every lane on each, a filter, and one choice that is also the item picker's.
// Where lanes draw, a tile holds the item's picture of every lane, with its distance to the baseline's.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const SIGNS = { right: '✓', wrong: '✗', done: '' };
  const FILTERS = [['all', 'all', () => true], ['wrong', 'wrong in some lane', (row) => row.states.includes('wrong')], ['differ', 'lanes differ', (row) => row.differs.some(Boolean)]];
  const KEY = '✓ right · ✗ wrong · ≠ differs from the baseline', JUDGED_KEY = '✓ the judge sees what was asked for · ✗ it sees something else · ≠ not what it sees in the baseline\'s', AWAY_KEY = 'dB: PSNR, then SSIM, to the baseline\'s picture';
  const farthest = (row) => Math.min(...row.lanes.map((lane) => lane.rank ?? Infinity));

  PS.gallery = (place, choose) => {
    const tiles = new Map();                                        // item -> {row, node}; nodes stay, so that focus and pictures do
    let filter = 'all', lanes = [], chosen = null, drawnCounts = '', byDistance = false;
    const grid = el('ul', { role: 'list', class: 'lg-grid', on: { keydown: move } }), none = el('p', { class: 'ps-quiet', hidden: true }, 'None so far.');
    const filters = el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Images shown' }), key = el('p', { class: 'lr-legend lg-key' });
    const order = button('farthest first', () => { byDistance = !byDistance; arrange(); show(); }, { class: 'pe-small lg-order', 'aria-pressed': 'false' });
    const image = (hidden) => el('img', { alt: '', decoding: 'async', draggable: 'false', hidden });

    function tile(row) {
      const parts = row.lanes ? [el('span', { class: 'lg-asked' }, el('b', { class: 'num' }, String(row.index + 1)), row.asked), el('span', { class: 'lg-cells', 'aria-hidden': 'true' }, row.lanes.map((_, i) => el('span', { class: 'lg-cell', 'data-lane': i }, el('span', { class: 'lg-place' }, image(true)), el('span', { class: 'lg-sees' }), el('span', { class: 'lg-away' }))))]
        : [image(), el('span', { class: 'lg-number num' }, String(row.index + 1)), el('span', { class: 'lg-marks', 'aria-hidden': 'true' })];
      const node = el('li', { class: 'lg-tile', 'data-item': row.id }, el('button', { type: 'button', tabindex: -1, on: { click: () => choose(row.id) } }, parts));
      const after = [...tiles.values()].filter((t) => t.row.index > row.index).sort((a, b) => a.row.index - b.row.index)[0];
      grid.insertBefore(node, after ? after.node : null);
      return { row, node };
    }

    function fill({ row, node }) {
      const target = node.firstChild;
      target.setAttribute('aria-label', row.label);
      target.title = row.label;
      if (row.lanes) { row.lanes.forEach((mine, i) => cell(target.querySelectorAll('.lg-cell')[i], mine, row, i)); return; }
      if (row.src) target.querySelector('img').src = row.src;
      target.querySelector('.lg-marks').replaceChildren(...row.states.map((state, i) => (state && lanes[i] ? el('span', { class: `lg-${state}` }, PS.laneMark(lanes[i]), SIGNS[state], row.differs[i] ? el('span', { class: 'lg-differs' }, '≠') : '') : '')).filter(Boolean));
    }

    /** A lane's picture: its newest look, what the judge sees, how far it is. */
    function cell(node, mine, row, i) {
      const [place, sees, away] = node.children, src = row.drawn?.[i] || row.previews?.[i];
      if (src) PS.showDrawn(place.firstChild, src, '');
      if (!row.states[i]) return;
      sees.replaceChildren(...[lanes[i] && PS.laneMark(lanes[i]), SIGNS[row.states[i]] && el('span', { class: `lg-${row.states[i]}` }, SIGNS[row.states[i]]), row.differs[i] && el('span', { class: 'lg-differs' }, '≠'), mine.sees && ` ${mine.sees}`].filter(Boolean));
      away.textContent = mine.equal ? 'equal' : [mine.psnr, mine.ssim].filter(Boolean).join(' · ');
    }

    /** Tiles in the order of the items, or the one farthest from the baseline's first. */
    function arrange() {
      const key = byDistance ? farthest : (row) => row.index, focused = document.activeElement;
      grid.append(...[...tiles.values()].sort((a, b) => key(a.row) - key(b.row) || a.row.index - b.row.index).map((t) => t.node));
      if (grid.contains(focused)) focused.focus({ preventScroll: true });
    }

    const passes = (row) => FILTERS.find(([id]) => id === filter)[2](row);
    const visible = () => [...grid.children].filter((node) => !node.hidden).map((node) => node.firstChild);

    function show() {
      for (const { row, node } of tiles.values()) node.hidden = !passes(row);
      const rows = [...tiles.values()].map((t) => t.row), counts = FILTERS.map(([id, words, test]) => [id, words, rows.filter(test).length]);
      if (JSON.stringify([counts, filter]) !== drawnCounts) {
        drawnCounts = JSON.stringify([counts, filter]);
        if (!filters.children.length) filters.append(...counts.map(([id]) => button('', () => { filter = id; show(); }, { class: 'pe-small', 'data-filter': id })), order);
        counts.forEach(([id, words, n], i) => {
          filters.children[i].textContent = `${words} (${n})`;
          filters.children[i].setAttribute('aria-pressed', String(id === filter));
        });
      }
      const drawn = rows.some((row) => row.lanes), judged = !drawn || rows.some((row) => row.lanes?.some((lane) => lane.sees));
      for (const b of filters.children) b.hidden = b === order ? !rows.some((row) => row.lanes && farthest(row) < Infinity) : !judged;
      order.setAttribute('aria-pressed', String(byDistance));
      const words = drawn ? [judged && JUDGED_KEY, AWAY_KEY].filter(Boolean).join(' · ') : KEY, signs = key.querySelector('.lg-signs');
      if (signs && signs.textContent !== words) signs.textContent = words;
      const buttons = visible();
      none.hidden = buttons.length > 0;
      if (!buttons.some((b) => b.tabIndex === 0)) rove(buttons.find((b) => b.parentNode.dataset.item === chosen) || buttons[0]);
    }

    function rove(target) {
      grid.querySelectorAll('button[tabindex="0"]').forEach((b) => { b.tabIndex = -1; });
      if (target) target.tabIndex = 0;
    }

    function move(event) {
      const buttons = visible(), at = buttons.indexOf(document.activeElement);
      if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
      const row = buttons.filter((b) => b.offsetTop === buttons[0].offsetTop).length;
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + row, ArrowUp: at - row, Home: 0, End: buttons.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const target = buttons[Math.max(0, Math.min(buttons.length - 1, to))];
      rove(target);
      target.focus();
    }

    return {
      take(news) {
        for (const row of news.rows) {
          const known = tiles.get(row.id) || tile(row);
          known.row = row;
          tiles.set(row.id, known);
          fill(known);
          delete row.src;                                           // the image has it
          delete row.drawn;
          delete row.previews;
        }
        if (byDistance) arrange();
        this.draw();
      },
      draw(newLanes = lanes, item = chosen) {
        const named = JSON.stringify(newLanes.map((l) => [l.mark, l.name])) !== JSON.stringify(lanes.map((l) => [l.mark, l.name]));
        lanes = newLanes;
        if (named) {
          for (const known of tiles.values()) fill(known);
          key.replaceChildren(...lanes.map((lane) => el('span', {}, PS.laneMark(lane), lane.name)), el('span', { class: 'lg-signs' }));
        }
        if (item !== chosen) {
          tiles.get(chosen)?.node.firstChild.removeAttribute('aria-current');
          chosen = item;
          tiles.get(chosen)?.node.firstChild.setAttribute('aria-current', 'true');
          if (!grid.contains(document.activeElement)) rove(tiles.get(chosen)?.node.firstChild || visible()[0]);
        }
        if (tiles.size < 2) return place.replaceChildren();
        if (!place.children.length) place.replaceChildren(el('figure', { class: 'lr-chart lg-all' }, el('figcaption', {}, el('h3', {}, 'Images')), filters, grid, none, key));
        place.firstChild.classList.toggle('lg-drawn', Boolean(tiles.values().next().value.row.lanes));
        place.firstChild.style.setProperty('--lanes', String(lanes.length));
        show();
      },
      clear() { tiles.clear(); grid.replaceChildren(); filter = 'all'; byDistance = false; chosen = null; place.replaceChildren(); },
    };
  };
})();
