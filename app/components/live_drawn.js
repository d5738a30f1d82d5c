// Pictures that lanes draw: the newest look in every column, two of them under a divider, and which steps reused work.
(() => {
  const PS = window.ParetoStudio, { el, svg } = PS;
  const COARSE = 128, SIGNS = { true: '✓', false: '✗' };          // pictures smaller than this are enlarged by whole factors, pixel by pixel
  const laneName = (lane) => (lane.letter ? `lane ${lane.letter}` : 'baseline');

  /** Show an address in an image, at once crisp and large where the picture is small. An address that it shows already is left alone. */
  PS.showDrawn = (img, src, alt, sized) => {
    img.alt = src ? alt : '';
    img.hidden = !src;
    if (!src) return img.removeAttribute('src');
    if (img.getAttribute('src') === src) return undefined;
    img.onload = () => {
      const w = img.naturalWidth, small = Math.max(w, img.naturalHeight) < COARSE;
      img.classList.toggle('li-coarse', small);
      (sized || img).style.width = small ? `round(down, 100%, ${w}px)` : '100%';
      if (sized) sized.style.aspectRatio = `${w} / ${img.naturalHeight}`;
    };
    img.src = src;
    return undefined;
  };

  /** A lane's column: the picture as it stands, how far it is, and in the end what the judge sees. The image node stays. */
  PS.drawnColumn = (box, mine, store, lane) => {
    const d = mine.drawn;
    let part = box.__drawn;
    if (!part || part.node.parentNode !== box) {
      part = box.__drawn = { img: el('img', { decoding: 'async', draggable: 'false' }), fill: el('span', { class: 'lr-fill' }), told: el('p', { class: 'ld-told' }), more: el('p', { class: 'ps-quiet' }) };
      part.track = el('span', { class: 'lr-track', 'aria-hidden': 'true' }, part.fill);
      part.node = el('figure', { class: 'ld-column' }, el('div', { class: 'ld-stage' }, part.img), part.track, el('figcaption', {}, part.told, part.more));
      box.replaceChildren(part.node);
    }
    part.node.dataset.state = d.state;
    PS.showDrawn(part.img, d.state === 'waiting' ? '' : store.drawn(mine.item, mine.lane), `${d.state === 'done' ? 'Picture' : `Unfinished picture, ${d.text}`}, ${lane}`);
    part.fill.style.width = `${(100 * d.done).toFixed(1)}%`;
    part.track.style.visibility = d.state === 'drawing' ? '' : 'hidden';
    part.told.replaceChildren(...told(d));
    part.more.textContent = [d.correct === false ? `asked for: ${d.expected}` : '', d.distance, mine.earlier].filter(Boolean).join(' · ');
  };

  /** ✓ or ✗ with its word, and what the judge sees. */
  const told = (d) => [d.correct === true || d.correct === false ? el('span', { class: d.correct ? '' : 'lg-wrong' }, `${SIGNS[d.correct]} ${d.correct ? 'right' : 'wrong'}${d.text ? ': ' : ''}`) : '', d.text];

  /** The figure under the columns: two pictures under a divider, and beside them what is known of every lane's picture. */
  PS.drawnPanel = (place) => {
    const title = el('h3', {}), asked = el('p', { class: 'lr-summary' }), lanes = el('ul', { role: 'list', class: 'ld-lanes' }), swipe = PS.swipe();
    const figure = el('figure', { class: 'lr-chart ld-compare' }, el('figcaption', {}, title, asked), el('div', { class: 'ld-two' }, swipe.node, lanes));
    return {
      draw(data, store) {
        if (!data?.item || data.lanes.length < 2) return place.replaceChildren();
        if (figure.parentNode !== place) place.replaceChildren(figure);
        title.textContent = `Side by side, ${data.place}`;
        asked.textContent = data.asked ? `asked for: ${data.asked}` : '';
        swipe.draw(data.item, data.lanes, store);
        PS.redraw(lanes, [data.item, data.lanes], () => [data.lanes.map(entry), data.lanes.some((lane) => lane.trace) ? el('li', { class: 'lr-key' }, 'a full cell: the step was computed; a pale part: the share of its work that was taken from an earlier step') : '']);
        return undefined;
      },
      clear() { swipe.clear(); place.replaceChildren(); },
    };
  };

  const entry = (lane) => el('li', { 'data-lane': lane.lane, style: `--lane:${lane.colour}` },
    el('div', { class: 'lr-name' }, PS.laneMark(lane), el('h4', {}, lane.name)),
    lane.text ? el('p', { class: 'ld-told' }, told(lane)) : '',
    lane.distance ? el('p', { class: 'ps-quiet' }, lane.distance) : '',
    lane.trace ? PS.stepTrace(lane.trace, laneName(lane)) : '');

  /** One cell a denoising step: filled from below by the share that was computed. */
  PS.stepTrace = (trace, name) => {
    const n = trace.shares.length, gap = n > 80 ? 0 : 0.14;
    const cells = trace.shares.map((share, i) => svg('g', { class: 'ld-cell', 'data-reused': share }, svg('title', {}, `step ${i + 1}: ${share ? `${Math.round(100 * share)} % reused` : 'computed'}`),
      svg('rect', { class: 'ld-reused', x: i + gap / 2, y: 0, width: 1 - gap, height: 1 }), svg('rect', { class: 'ld-computed', x: i + gap / 2, y: share, width: 1 - gap, height: 1 - share })));
    return el('div', { class: 'ld-trace' }, svg('svg', { viewBox: `0 0 ${n} 1`, preserveAspectRatio: 'none', role: 'img', 'aria-label': `Denoising steps, ${name}: ${trace.words}` }, cells), el('p', { class: 'ps-quiet' }, trace.text));
  };
})();
