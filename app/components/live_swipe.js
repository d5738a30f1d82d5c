// Two pictures of the same seed on top of each other, and a divider between them that is dragged or moved by keys.
(() => {
  const PS = window.ParetoStudio, { el } = PS;
  const KEYS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };

  PS.swipe = () => {
    let sides = null, lanes = [], item = '', store = null;                                  // sides: lane on the left, lane on the right
    const range = el('input', { type: 'range', class: 'ls-range', min: 0, max: 100, step: 0.1, value: 50, 'aria-label': 'Divider between the two pictures', on: { input: move, keydown: key } });
    const under = el('img', { draggable: 'false', class: 'ls-right' }), over = el('img', { draggable: 'false', class: 'ls-left' });
    const line = el('span', { class: 'ls-line', 'aria-hidden': 'true' }, el('span', { class: 'ls-grip' }, '◂▸'));
    const stage = el('div', { class: 'ls-stage' }, under, over, range, line), words = el('p', { class: 'ps-quiet ls-told' });
    const selects = ['left', 'right'].map((side, i) => el('select', { 'aria-label': `Picture on the ${side}`, on: { change: (e) => choose(i, Number(e.target.value)) } }));

    /** The one on the other side changes place where it is asked for. */
    function choose(side, lane) {
      if (sides[1 - side] === lane) sides.reverse();
      else sides[side] = lane;
      show();
    }
    function key(event) {
      const by = KEYS[event.key];
      if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      range.value = Math.round(Number(range.value)) + by * (event.shiftKey && Math.abs(by) === 1 ? 10 : 1);
      move();
    }
    function move() {
      const at = Number(range.value), names = sides ? sides.map((lane) => lanes[lane].name) : ['', ''];
      over.style.clipPath = `inset(0 ${(100 - at).toFixed(1)}% 0 0)`;
      line.style.left = `${at}%`;
      range.setAttribute('aria-valuetext', `${Math.round(at)} % ${names[0]}, ${100 - Math.round(at)} % ${names[1]}`);
    }
    function show() {
      for (const [i, select] of selects.entries()) {
        PS.redraw(select, lanes.map((l) => [l.mark, l.name]), () => lanes.map((l) => el('option', { value: l.lane }, `${l.mark} ${l.name}`)));
        select.value = String(sides[i]);
      }
      const [left, right] = sides.map((lane) => lanes[lane]), missing = (lane) => (lane.state !== 'done' ? `${lane.name}: ${lane.text}` : store.drawn(item, lane.lane) ? '' : `${lane.name}: on its way to this page`);
      PS.showDrawn(under, store.drawn(item, right.lane), `Picture of ${right.name}`, stage);
      PS.showDrawn(over, store.drawn(item, left.lane), `Picture of ${left.name}`, stage);
      const away = [left, right].filter((lane) => lane.lane > 0);
      words.textContent = [...[left, right].map(missing), ...away.map((lane) => lane.distance && `${lane.name}: ${lane.distance}${away.length > 1 ? ' (to the baseline)' : ''}`)].filter(Boolean).join(' · ');
      move();
    }

    return {
      node: el('div', { class: 'ls-swipe' }, el('div', { class: 'ls-sides' }, selects), stage, words),
      draw(newItem, newLanes, newStore) {
        [item, lanes, store] = [newItem, newLanes, newStore];
        sides = sides && sides.every((lane) => lane < lanes.length) ? sides : [0, lanes.length - 1];
        show();
      },
      clear() { sides = null; range.value = 50; },
    };
  };
})();
