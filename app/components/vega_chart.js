// Vega-Lite charts with a sentence and a table. The libraries are loaded from this studio when the first chart is shown.
(() => {
  const PS = window.ParetoStudio, { el } = PS;
  let libraries = null;

  const load = (address) => {
    libraries = libraries || new Promise((resolve, reject) => {
      const script = el('script', { src: new URL(address, document.baseURI).href, on: { load: () => resolve(window.vegaEmbed), error: () => reject(new Error('the chart library cannot be loaded from the studio')) } });
      document.head.append(script);
    });
    return libraries;
  };

  // Custom properties of the page, so that the theme changes charts without drawing them again.
  const CONFIG = {
    background: 'transparent', aria: false, font: 'system-ui, sans-serif', view: { stroke: 'transparent' },
    axis: { labelColor: 'var(--ps-quiet)', titleColor: 'var(--ps-quiet)', gridColor: 'var(--ps-line)', domainColor: 'var(--ps-line)', tickColor: 'var(--ps-line)', labelFontSize: 11, titleFontSize: 11.5, titleFontWeight: 400, gridOpacity: 0.7, titlePadding: 8 },
  };

  PS.mountVega = (root, props, trigger, watch) => {
    const place = root.querySelector('.vc-place'), say = PS.announcer(root.querySelector('[role=status]'));
    let views = [], shown = '', chosen = '', width = 0;

    const choose = (id) => { mark(id); trigger('select', { run: id }); };
    const mark = (id) => {
      chosen = id || '';
      for (const view of views) if (view.signal && 'chosen' in (view.getState().signals || {})) view.signal('chosen', chosen).runAsync();
      for (const b of place.querySelectorAll('[data-run]')) b.setAttribute('aria-pressed', String(b.dataset.run === chosen));
    };

    async function plot(holder, spec, label) {
      const embed = await load(props.bundle);
      if (!holder.isConnected || !holder.clientWidth) return;
      const sized = { ...structuredClone(spec), width: Math.max(220, holder.clientWidth), padding: { left: 4, right: 16, top: 4, bottom: 4 }, autosize: { type: 'fit', contains: 'padding' } };
      if (sized.width < 480 && sized.layer) sized.layer = sized.layer.filter((layer) => !(layer.name || '').startsWith('wide'));
      const { view } = await embed(holder, sized, { actions: false, renderer: 'svg', config: CONFIG });
      view.addEventListener('click', (event, item) => { if (item?.datum?.run && 'chosen' in (view.getState().signals || {})) choose(item.datum.run); });
      const svg = holder.querySelector('svg');
      svg.setAttribute('role', 'img');
      svg.setAttribute('aria-label', label);
      svg.firstElementChild?.setAttribute('aria-hidden', 'true');       // the sentence and the table say it better than a list of marks
      holder.__view = view;
      views.push(view);
      holder.dataset.ready = '1';
    }

    function draw() {
      const v = props.value || {}, now = JSON.stringify(v);
      if (now !== shown) build(v);
      if (shown !== now && v.announce) say(v.summary);
      shown = now;
      if (v.chosen !== undefined) mark(v.chosen);
    }

    function build(v) {
      const open = place.querySelector('details')?.open;
      views.forEach((view) => view.finalize());
      views = [];
      if (!v.title) return place.replaceChildren();
      const head = el('figcaption', {}, el('h2', {}, v.title), v.summary ? el('p', { class: 'vc-summary' }, v.summary) : '');
      if (v.empty) return place.replaceChildren(head, el('p', { class: 'ps-empty' }, v.empty));
      const plots = (v.specs || []).map(() => el('div', { class: 'vc-plot' }));
      const picks = (v.table?.rows || []).some((r) => r.id);
      const table = v.table ? PS.dataTable(v.table, choose, v.title) : '';
      place.replaceChildren(head, v.warning ? el('p', { class: 'ps-note ps-note-warning' }, v.warning) : '', el('div', { class: 'vc-plots' }, plots),
        !table ? '' : picks ? table : el('details', { open }, el('summary', {}, 'Table'), table));
      width = place.clientWidth;
      Promise.all(plots.map((holder, i) => plot(holder, v.specs[i], `${v.title}. ${v.summary || ''}`)))
        .then(() => { if (chosen) mark(chosen); })
        .catch((error) => plots[0]?.replaceChildren(el('p', { class: 'ps-note ps-note-error' }, String(error.message || error))));
    }

    new ResizeObserver(PS.framed(() => {
      if (!place.clientWidth || Math.abs(place.clientWidth - width) < 24) return;
      shown = '';
      draw();
    })).observe(place);
    watch('value', draw);
    draw();
    root.dataset.ready = '1';
  };

  /** A table whose rows are lists of texts, or {id, mark, colour, cells}: then the first cell is a button. */
  PS.dataTable = ({ head, rows }, choose, label) => {
    const first = (row, text) => (row.id
      ? el('button', { type: 'button', class: 'dt-pick', 'data-run': row.id, 'aria-pressed': 'false', on: { click: () => choose(row.id) } }, PS.laneMark(row), ` ${text}`)
      : [row.mark ? PS.laneMark(row) : '', row.mark ? ` ${text}` : text]);
    const line = (row) => {
      const cells = Array.isArray(row) ? row : row.cells;
      return el('tr', {}, cells.map((cell, i) => (i ? el('td', { class: /^[\d–(−-]/.test(cell) ? 'num' : '' }, cell) : el('th', { scope: 'row' }, first(row, cell)))));
    };
    return el('div', { class: 'dt-scroll', tabindex: 0, role: 'region', 'aria-label': `Table: ${label}` }, el('table', { class: 'dt' },
      el('thead', {}, el('tr', {}, head.map((h) => el('th', { scope: 'col' }, h)))), el('tbody', {}, rows.map(line))));
  };
})();
