// All pictures of a race as a grid: marks of every lane on each, a filter, and one choice that is also the item picker's.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const SIGNS = { right: '✓', wrong: '✗', done: '' };
  const FILTERS = [['all', 'all', () => true], ['wrong', 'wrong in some lane', (row) => row.states.includes('wrong')], ['differ', 'lanes differ', (row) => row.differs.some(Boolean)]];

  PS.gallery = (place, choose) => {
    const tiles = new Map();                                        // item -> {row, node}; nodes stay, so that focus and pictures do
    let filter = 'all', lanes = [], chosen = null, drawnCounts = '';
    const grid = el('ul', { role: 'list', class: 'lg-grid', on: { keydown: move } }), none = el('p', { class: 'ps-quiet', hidden: true }, 'None so far.');
    const filters = el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Images shown' }), key = el('p', { class: 'lr-legend lg-key' });

    function tile(row) {
      const node = el('li', { class: 'lg-tile', 'data-item': row.id }, el('button', { type: 'button', tabindex: -1, on: { click: () => choose(row.id) } },
        el('img', { alt: '', decoding: 'async', draggable: 'false' }), el('span', { class: 'lg-number num' }, String(row.index + 1)), el('span', { class: 'lg-marks', 'aria-hidden': 'true' })));
      const after = [...tiles.values()].filter((t) => t.row.index > row.index).sort((a, b) => a.row.index - b.row.index)[0];
      grid.insertBefore(node, after ? after.node : null);
      return { row, node };
    }

    function fill({ row, node }) {
      const target = node.firstChild;
      target.setAttribute('aria-label', row.label);
      target.title = row.label;
      if (row.src) target.querySelector('img').src = row.src;
      target.querySelector('.lg-marks').replaceChildren(...row.states.map((state, i) => (state && lanes[i] ? el('span', { class: `lg-${state}` }, PS.laneMark(lanes[i]), SIGNS[state], row.differs[i] ? el('span', { class: 'lg-differs' }, '≠') : '') : '')).filter(Boolean));
    }

    const passes = (row) => FILTERS.find(([id]) => id === filter)[2](row);
    const visible = () => [...grid.children].filter((node) => !node.hidden).map((node) => node.firstChild);

    function show() {
      for (const { row, node } of tiles.values()) node.hidden = !passes(row);
      const rows = [...tiles.values()].map((t) => t.row), counts = FILTERS.map(([id, words, test]) => [id, words, rows.filter(test).length]);
      if (JSON.stringify([counts, filter]) !== drawnCounts) {
        drawnCounts = JSON.stringify([counts, filter]);
        if (!filters.children.length) filters.append(...counts.map(([id]) => button('', () => { filter = id; show(); }, { class: 'pe-small', 'data-filter': id })));
        counts.forEach(([id, words, n], i) => {
          filters.children[i].textContent = `${words} (${n})`;
          filters.children[i].setAttribute('aria-pressed', String(id === filter));
        });
      }
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
        }
        this.draw();
      },
      draw(newLanes = lanes, item = chosen) {
        const named = JSON.stringify(newLanes.map((l) => [l.mark, l.name])) !== JSON.stringify(lanes.map((l) => [l.mark, l.name]));
        lanes = newLanes;
        if (named) {
          for (const known of tiles.values()) fill(known);
          key.replaceChildren(...lanes.map((lane) => el('span', {}, PS.laneMark(lane), lane.name)), el('span', {}, '✓ right · ✗ wrong · ≠ differs from the baseline'));
        }
        if (item !== chosen) {
          tiles.get(chosen)?.node.firstChild.removeAttribute('aria-current');
          chosen = item;
          tiles.get(chosen)?.node.firstChild.setAttribute('aria-current', 'true');
          if (!grid.contains(document.activeElement)) rove(tiles.get(chosen)?.node.firstChild || visible()[0]);
        }
        if (tiles.size < 2) return place.replaceChildren();
        if (!place.children.length) place.replaceChildren(el('figure', { class: 'lr-chart lg-all' }, el('figcaption', {}, el('h3', {}, 'Images')), filters, grid, none, key));
        show();
      },
      clear() { tiles.clear(); grid.replaceChildren(); filter = 'all'; chosen = null; place.replaceChildren(); },
    };
  };
})();
