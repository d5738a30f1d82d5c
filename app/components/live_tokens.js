// Image tokens over their picture: a panel per lane, a veil over what the lane dropped, outlines around what it merged.
(() => {
  const PS = window.ParetoStudio, { el, svg, button } = PS;
  const KEPT = 0.9995, NEAR = 1e-6, LONG = 1000, PALEST = 0.3, HIGHEST = 420, SMALLEST = 224;
  const percent = (share) => `${Number((100 * share).toFixed(1))} %`;

  /** Which tokens a view shows: those of the whole image, or of its tiles. */
  const inView = (images, tiles) => images.boxes.map((box, i) => box.length === 4 && (images.views[i] > 0) === tiles);

  /** A dark, hatched pattern over what is dropped. */
  PS.veil = (id) => svg('defs', {}, svg('pattern', { id, width: 18, height: 18, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' },
    svg('rect', { width: 18, height: 18, class: 'li-dark' }), svg('rect', { width: 3.5, height: 18, class: 'li-line' })));

  /** One lane's picture. `draw` shows it anew: another view, or another keep of the slider; the slider itself stays. */
  PS.tokenPanel = (images, lane, src, place) => {
    const size = Math.max(images.width, images.height), w = LONG * images.width / size, h = LONG * images.height / size;
    const name = lane.letter ? `lane ${lane.letter}` : 'baseline', veil = PS.uid('veil');
    const picture = el('img', { class: size < SMALLEST ? 'li-coarse' : false, alt: `Picture of ${images.place}`, src: src || false, draggable: 'false' });
    const overlay = svg('svg', { viewBox: `0 0 ${w} ${h}`, preserveAspectRatio: 'none', role: 'img', class: 'li-overlay' }), caption = el('p', { class: 'li-caption' });
    const most = Math.min(HIGHEST, Math.max(SMALLEST, 3 * images.height));
    const stage = el('div', { class: 'li-stage', style: `aspect-ratio:${images.width} / ${images.height};width:min(100%, ${Math.round(most * images.width / images.height)}px)` }, picture, lane.share.length ? overlay : '');
    const map = lane.saliency ? el('img', { class: 'li-stage li-coarse', alt: `Map of ${place}, ${name}`, src: lane.saliency, style: `aspect-ratio:${images.width} / ${images.height}` }) : '';
    let tiles = false, keep = lane.own;

    const cells = lane.share.length ? fillOverlay() : [], groups = overlay.querySelector('.li-groups');
    const slider = lane.level.length ? keepSlider(lane, (value) => { keep = value; draw(tiles); }) : null;

    function fillOverlay() {
      overlay.append(PS.veil(veil));
      const all = images.boxes.map((box, i) => {
        if (box.length !== 4 || i >= lane.share.length) return null;
        const [l, t, r, b] = box.map((v, side) => v / 10000 * (side % 2 ? h : w));
        return svg('rect', { x: l, y: t, width: Math.max(0, r - l), height: Math.max(0, b - t), class: 'li-cell', 'data-token': i });
      });
      overlay.append(...all.filter(Boolean), svg('g', { class: 'li-groups' }));
      return all;
    }

    function draw(showTiles) {
      tiles = showTiles;
      const shown = inView(images, tiles), asRun = keep === lane.own, least = Math.min(1, ...lane.share);
      const merged = asRun ? PS.mergedGroups(lane.group) : new Map(), inGroup = new Set([...merged.values()].flat());
      const kept = lane.share.map((share, i) => (asRun ? share >= KEPT : lane.level[i] <= keep + NEAR));
      cells.forEach((cell, i) => {
        if (!cell) return;
        const clear = kept[i] || inGroup.has(i), share = lane.share[i] < KEPT ? lane.share[i] : least;
        cell.style.display = shown[i] ? '' : 'none';
        cell.dataset.kept = clear ? '1' : '0';
        cell.setAttribute('fill', clear ? 'none' : `url(#${veil})`);
        cell.setAttribute('fill-opacity', clear ? 0 : Math.max(PALEST, 1 - share).toFixed(3));
      });
      groups?.replaceChildren(...[...merged].map(([, tokens], at) => PS.groupShape(tokens.filter((i) => shown[i] && cells[i]).map((i) => cells[i]), at)).filter(Boolean));
      const left = kept.filter(Boolean).length, would = `${left.toLocaleString('en')} of ${lane.share.length.toLocaleString('en')} image tokens would be kept`;
      caption.textContent = asRun ? lane.caption : would;
      slider?.say(asRun ? `as in the run: keep ${percent(lane.own)}` : `what this policy would keep at ${percent(keep)}; the run itself kept ${percent(lane.own)}`, keep, !asRun);
      overlay.setAttribute('aria-label', `${lane.name}: ${caption.textContent}${images.mixed ? `; shown: ${tiles ? 'tiles' : 'whole image'}` : ''}`);
    }

    const node = el('section', { class: 'li-panel', 'data-panel': lane.lane, style: `--lane:${lane.colour}`, 'aria-label': `Picture, ${name}` },
      el('div', { class: 'lr-name' }, PS.laneMark(lane), el('h4', {}, lane.name)), el('div', { class: map ? 'li-pair' : '' }, stage, map), caption, slider?.node || '');
    return { node, draw, picture };
  };

  /** keep: from the run's own setting, in steps of one per cent. */
  function keepSlider(lane, moved) {
    const own = Number((100 * lane.own).toFixed(2)), step = Number.isInteger(own) ? 1 : 0.1;
    const range = el('input', { type: 'range', min: step, max: 100, step, value: own, 'aria-label': `keep, ${lane.name}`, on: { input: () => moved(Math.abs(range.value - own) < step / 2 ? lane.own : range.value / 100) } });
    const value = el('output', { class: 'num' }), text = el('p', { class: 'ps-quiet li-what', 'aria-live': 'polite' });
    const back = button('↺', () => { range.value = own; range.focus(); moved(lane.own); }, { class: 'pe-icon', disabled: true, title: 'as in the run', 'aria-label': `keep as in the run, ${lane.name}` });
    return {
      node: el('div', {}, el('div', { class: 'li-keep' }, el('span', { 'aria-hidden': 'true' }, 'keep'), range, value, back), text),
      say(words, keep, away) {
        value.textContent = percent(keep);
        range.setAttribute('aria-valuetext', percent(keep));
        text.textContent = words;
        back.disabled = !away;
      },
    };
  }

  /** Group number -> tokens, for groups of at least two. */
  PS.mergedGroups = (group) => {
    const found = new Map();
    group.forEach((g, i) => { if (g >= 0) found.set(g, [...(found.get(g) || []), i]); });
    for (const [g, tokens] of found) if (tokens.length < 2) found.delete(g);
    return found;
  };

  /** The cells of one group in one tint, with a line around them wherever the neighbour is of another group. */
  PS.groupShape = (cells, at) => {
    if (!cells.length) return null;
    const sides = new Map(), key = (v) => v.toFixed(1);
    let body = '';
    for (const cell of cells) {
      const [x, y, w, h] = ['x', 'y', 'width', 'height'].map((a) => Number(cell.getAttribute(a)));
      body += `M${x} ${y}h${w}v${h}h${-w}z`;
      for (const [a, b, c, d] of [[x, y, x + w, y], [x + w, y, x + w, y + h], [x, y + h, x + w, y + h], [x, y, x, y + h]]) {
        const side = [a, b, c, d].map(key).join(' ');
        sides.set(side, sides.has(side) ? '' : `M${a} ${b}L${c} ${d}`);          // a side that two cells of the group share is inside
      }
    }
    const outline = [...sides.values()].join(''), hue = Math.round(at * 137.5) % 360;
    return svg('g', { class: 'li-group', style: `--hue:${hue}`, 'data-tokens': cells.length }, svg('title', {}, `${cells.length} tokens merged into one`),
      svg('path', { d: body, class: 'li-tint' }), svg('path', { d: outline, class: 'li-halo' }), svg('path', { d: outline, class: 'li-outline' }));
  };
})();
