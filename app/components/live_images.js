// Pictures of a race: the store of what has arrived, the question with its picture, the panels of the lanes, bars of classes.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;

  /** Pictures and marks of the watched experiment. Python sends each picture once; `upto` says how far it has come. */
  PS.pictureStore = () => {
    const sources = new Map(), looks = new Map();                   // item, or item/lane -> address; item/lane -> a picture on its way
    const store = {
      upto: -1,
      take(news) {
        store.upto = news.upto;
        for (const row of news.rows) {
          if (row.src) sources.set(row.id, row.src);
          for (const [lane, src] of Object.entries(row.previews || {})) looks.set(`${row.id}/${lane}`, src);
          for (const [lane, src] of Object.entries(row.drawn || {})) { sources.set(`${row.id}/${lane}`, src); looks.delete(`${row.id}/${lane}`); }
        }
      },
      source: (id) => sources.get(id) || '',
      drawn: (id, lane) => sources.get(`${id}/${lane}`) || looks.get(`${id}/${lane}`) || '',
      clear() { store.upto = -1; sources.clear(); looks.clear(); },
    };
    return store;
  };

  /** What is asked, with its picture, above the columns of the lanes; or what is to be drawn. */
  PS.questionAsked = (place, images, store, streams) => {
    if (streams?.drawing && streams.prompt) {
      PS.redraw(place, [streams.item, streams.prompt, streams.place], () => [el('figure', { class: 'li-question' },
        el('figcaption', {}, el('span', { class: 'ps-quiet' }, `Asked for, ${streams.place}`), el('p', {}, streams.prompt)))]);
      return;
    }
    const src = images?.item ? store.source(images.item) : '';
    PS.redraw(place, images?.question ? [images.item, images.question, images.place, Boolean(src)] : null, () => (images?.question ? [
      el('figure', { class: 'li-question' }, el('img', { class: 'li-small', alt: `Picture of ${images.place}`, src: src || false }),
        el('figcaption', {}, el('span', { class: 'ps-quiet' }, `Question, ${images.place}`), el('p', {}, images.question)))] : []));
  };

  /** Likeliest classes of an item, beside its picture. */
  PS.classBars = (mine, src) => el('div', { class: 'li-classes' }, el('img', { class: 'li-small li-coarse', alt: 'The picture', src: src || false }),
    el('ul', { role: 'list', class: 'li-bars', 'aria-label': 'Likeliest classes' }, mine.bars.map((bar) => el('li', { class: `li-bar${bar.expected ? ' li-expected' : ''}` },
      el('span', { class: 'li-class' }, bar.label, bar.expected ? el('span', { class: 'li-right' }, ' ◂ expected') : ''), el('span', { class: 'num' }, bar.text),
      el('span', { class: 'lr-track', 'aria-hidden': 'true' }, el('span', { class: 'lr-fill', style: `width:${(100 * bar.share).toFixed(1)}%` }))))));

  /** The panels under the columns: tokens over the picture, and the maps that lanes drew. Panels that did not change stay. */
  PS.imagePanels = (place) => {
    let panels = new Map(), tiles = false, images = null;
    const title = el('h3', {}), views = el('div', { class: 'lr-tabs', role: 'group', 'aria-label': 'Part of the image' }), key = el('p', { class: 'lr-key' }), body = el('div', { class: 'li-panels' });

    const choose = (wanted) => { tiles = wanted; show(); };
    function show() {
      PS.redraw(views, [images.mixed, tiles], () => (images.mixed ? [false, true].map((value) => button(value ? 'tiles' : 'whole image', () => {
        choose(value);
        views.querySelector('[aria-pressed=true]').focus();
      }, { class: 'pe-small', 'aria-pressed': String(value === tiles) })) : []));
      for (const panel of panels.values()) panel.draw(images.mixed ? tiles : !images.hasWhole);
    }

    return (given, store) => {
      if (!given?.item || !(given.tokens || given.maps)) {
        panels.clear();
        return place.replaceChildren();
      }
      const placed = given.views.filter((v, i) => given.boxes[i].length), hasWhole = placed.some((v) => v === 0);
      images = { ...given, hasWhole, mixed: hasWhole && placed.some((v) => v > 0) };
      if (images.item !== place.dataset.item) { tiles = tiles && images.mixed; place.dataset.item = images.item; }
      if (!place.children.length) place.replaceChildren(el('div', { class: 'li-head' }, title, views), body, key);
      title.textContent = `${images.tokens ? 'Image tokens' : 'Maps'}, ${images.place}`;
      const src = store.source(images.item), next = new Map(), shared = JSON.stringify([images.item, images.width, images.height, images.boxes, images.views]);
      for (const lane of images.lanes) {
        const old = panels.get(lane.lane), now = JSON.stringify(lane) + shared;
        const panel = old?.now === now ? old : { ...PS.tokenPanel(images, lane, src, images.place), now };
        if (src && !panel.picture.getAttribute('src')) panel.picture.src = src;
        next.set(lane.lane, panel);
      }
      const nodes = [...next.values()].map((panel) => panel.node);
      if (nodes.length !== body.children.length || nodes.some((node, i) => body.children[i] !== node)) {
        const focused = document.activeElement;
        body.replaceChildren(...nodes);
        if (nodes.some((node) => node.contains(focused))) focused.focus({ preventScroll: true });
      }
      panels = next;
      legend();
      show();
    };

    function legend() {
      const lanes = images.lanes.filter((lane) => lane.share.length), some = (test) => lanes.some((lane) => {
        const merged = new Set([...PS.mergedGroups(lane.group).values()].flat());
        return lane.share.some((share, i) => !merged.has(i) && test(share));
      });
      const words = lanes.length ? ['clear: kept', some((s) => s === 0) && 'hatched: dropped', some((s) => s > 0 && s < 0.9995) && 'lightly hatched: dropped part of the way through the layers',
        lanes.some((lane) => PS.mergedGroups(lane.group).size) && 'one outline and tint: merged into one token'].filter(Boolean) : [];
      key.textContent = words.length > 1 ? words.join(' · ') : '';
    }
  };
})();
