// The history: filters, a page of experiments with their lanes, picking, tags, notes, delete and undo.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const FILTERS = [['model', 'Model'], ['workload', 'Workload'], ['status', 'Status'], ['tag', 'Tag']];
  const KEPT = 'pareto-studio-picked';                        // for this tab, so that a reload finds the comparison again
  const HEAD = ['Run', 'Speed', 'KV or weights', 'Peak memory', 'Quality'];

  PS.mountHistory = (root, props, trigger, watch, server) => {
    const part = (name) => root.querySelector(`.ht-${name}`);
    const query = { text: '', model: '', workload: '', status: '', tag: '', deleted: false, page: 0 };
    let data = null, picked = [...(props.value?.picked || [])], asked = 0, form = null;

    // ---- asking the server ----
    async function load() {
      const mine = ++asked;
      try {
        const answer = await server.history_page(query);
        if (mine !== asked) return;
        data = answer;
        query.page = data.page;
        if (!form) draw();                                    // what is being written stays
      } catch { if (mine === asked) said('The history cannot be read; reload the page.', 'error'); }
    }
    async function act(request, focus) {
      const answer = await server.history_act(request).catch(() => ({ error: 'The studio did not answer; try again.' }));
      if (answer.error) return said(answer.error, 'error');
      form = null;
      if (request.do === 'delete') pick(picked.filter((id) => !request.experiments.includes(experimentOf(id))));
      await load();
      said(answer.message, 'info', answer.undo);
      (request.do === 'delete' ? part('said').querySelector('.ht-undo') : focus && part('scroll').querySelector(focus))?.focus();
    }
    function said(message, tone, undo) {
      part('said').replaceChildren(el('div', { class: `ps-note ps-note-${tone}` }, el('span', {}, message, ' '), undo ? button('Undo', () => act(undo), { class: 'pe-small ht-undo' }) : ''));
    }
    const experimentOf = (id) => id.slice(0, id.lastIndexOf('/'));

    // ---- picking ----
    function pick(ids) {
      if (ids.length > props.most) { said(`At most ${props.most} runs can be compared at once; take some out first.`, 'warning'); ids = ids.slice(0, props.most); }
      picked = ids;
      props.value = { picked };
      try { sessionStorage.setItem(KEPT, JSON.stringify(ids)); } catch { /* a frame without storage: picks end with the page */ }
      drawChecks();
      drawTray();
    }
    function pickAgain() {
      let kept = [];
      try { kept = JSON.parse(sessionStorage.getItem(KEPT)) || []; } catch { /* as above */ }
      if (!picked.length && kept.length) pick(kept);
    }
    const toggle = (ids, on) => pick(on ? [...picked, ...ids.filter((id) => !picked.includes(id))] : picked.filter((id) => !ids.includes(id)));
    function drawChecks() {
      for (const box of part('scroll').querySelectorAll('input[data-lanes]')) {
        const ids = JSON.parse(box.dataset.lanes), n = ids.filter((id) => picked.includes(id)).length;
        box.checked = n === ids.length && n > 0;
        box.indeterminate = n > 0 && n < ids.length;
        box.closest('tr').classList.toggle('ht-picked', n > 0);
      }
    }
    function drawTray() {
      const style = new Map((props.names || []).map((r) => [r.id, r])), experiments = new Set(picked.map(experimentOf));
      PS.redraw(part('tray'), [picked, [...style.values()]], () => (picked.length ? [
        el('div', { class: 'ht-tray-head' }, el('h2', {}, `Comparing ${picked.length} ${picked.length === 1 ? 'run' : 'runs'} of ${experiments.size} ${experiments.size === 1 ? 'experiment' : 'experiments'}`),
          button('Clear', () => { pick([]); part('scroll').focus(); }, { class: 'pe-small' })),
        el('ul', { class: 'ht-chips', role: 'list' }, picked.map((id) => {
          const run = style.get(id) || { name: id, mark: '', colour: 'inherit' };
          return el('li', {}, PS.laneMark(run), el('span', {}, run.name), button('✕', () => toggle([id], false), { class: 'ht-x', 'aria-label': `Take out ${run.name}` }));
        }))] : []));
    }

    // ---- filters and pages ----
    const text = el('input', { type: 'search', placeholder: 'Search id, model, pipeline, tag, note', 'aria-label': 'Search the history' });
    const selects = FILTERS.map(([name, label]) => el('select', { 'aria-label': `Filter by ${label.toLowerCase()}`, 'data-filter': name, on: { change: (e) => ask({ [name]: e.target.value }) } }));
    const deleted = el('input', { type: 'checkbox', on: { change: () => ask({ deleted: deleted.checked }) } });
    let waiting = 0;
    const ask = (change) => { Object.assign(query, change, { page: 0 }); clearTimeout(waiting); waiting = setTimeout(load, 'text' in change ? 250 : 0); };
    text.addEventListener('input', () => ask({ text: text.value }));
    part('filters').addEventListener('submit', (e) => e.preventDefault());
    part('filters').append(text, ...selects, el('label', { class: 'ps-check' }, deleted, 'Deleted'), button('Reload', load, { class: 'pe-small' }));
    function drawFilters() {
      FILTERS.forEach(([name, label], i) => PS.redraw(selects[i], [data.choices[name], query[name]], () => {
        const options = [el('option', { value: '' }, `Any ${label.toLowerCase()}`), ...data.choices[name].map(([value, shown]) => el('option', { value, selected: value === query[name] }, shown))];
        return options;
      }));
    }
    function drawPager() {
      const go = (page) => { query.page = page; load(); };
      const had = part('pager').contains(document.activeElement) ? document.activeElement.dataset.go : null;
      PS.redraw(part('pager'), [data.page, data.pages, data.total], () => [
        el('span', { class: 'ps-quiet' }, `${data.total.toLocaleString('en')} ${data.total === 1 ? 'experiment' : 'experiments'}`),
        ...(data.pages > 1 ? [button('‹ Newer', () => go(data.page - 1), { class: 'pe-small', disabled: data.page === 0, 'data-go': 'newer' }),
          el('span', { class: 'num' }, `page ${data.page + 1} of ${data.pages.toLocaleString('en')}`),
          button('Older ›', () => go(data.page + 1), { class: 'pe-small', disabled: data.page + 1 >= data.pages, 'data-go': 'older' })] : [])]);
      if (had) (part('pager').querySelector(`[data-go=${had}]:not([disabled])`) || part('pager').querySelector('button:not([disabled])'))?.focus();
    }

    // ---- the table ----
    function draw() {
      drawFilters();
      drawPager();
      const place = part('scroll');
      if (data.empty) place.replaceChildren(el('p', { class: 'ps-empty' }, data.empty));
      else {
        const head = el('tr', {}, HEAD.map((h, i) => el('th', { scope: 'col', class: i ? 'num' : '' }, h)), el('th', { scope: 'col' }, 'Remarks'));
        place.replaceChildren(el('table', { class: 'ht-table' }, el('thead', {}, head), ...data.experiments.map(group)));
      }
      drawChecks();
      drawTray();
    }
    const check = (ids, label) => el('input', { type: 'checkbox', 'data-lanes': JSON.stringify(ids), 'aria-label': label, on: { change: (e) => toggle(ids, e.target.checked) } });
    function group(e) {
      const title = `${e.model} · ${e.workload}`, ids = e.lanes.map((l) => l.id), named = `${title}, ${e.when}`;
      const open = (kind) => { form = form?.id === e.id && form.kind === kind ? null : { id: e.id, kind }; draw(); place().querySelector('.ht-form input, .ht-form textarea')?.focus(); };
      const place = () => root.querySelector(`[data-experiment="${CSS.escape(e.id)}"]`);
      const actions = e.deleted
        ? [button('Bring back', () => act({ do: 'undelete', experiments: [e.id] }), { class: 'pe-small', 'aria-label': `Bring back ${named}` })]
        : [button('Tag', () => open('tag'), { class: 'pe-small', 'data-act': 'tag', 'aria-label': `Tag ${named}` }),
          button('Note', () => open('note'), { class: 'pe-small', 'data-act': 'note', 'aria-label': `Write a note on ${named}` }),
          button('Delete', () => act({ do: 'delete', experiments: [e.id] }), { class: 'pe-small', 'data-act': 'delete', 'aria-label': `Delete ${named}` })];
      const tags = e.tags.map((t) => el('span', { class: 'ht-tag' }, t, e.deleted ? '' : button('✕', () => act({ do: 'untag', experiments: [e.id], text: t }), { class: 'ht-x', 'aria-label': `Take the tag ${t} off ${named}` })));
      const head = el('th', { colspan: HEAD.length + 1, scope: 'rowgroup' }, el('div', { class: 'ht-head' },
        el('label', { class: 'ht-check' }, check(ids, `All lanes of ${named}`)), el('span', { class: 'ht-title' }, title),
        el('span', { class: 'ps-quiet' }, [e.when, e.device, e.status, e.origin === 'import' ? 'imported' : ''].filter(Boolean).join(' · ')), ...tags, el('span', { class: 'ht-actions' }, actions)),
        e.error ? el('p', { class: 'ps-note ps-note-error' }, e.error) : '', e.note ? el('p', { class: 'ht-note' }, e.note) : '', form?.id === e.id ? editor(e) : '');
      return el('tbody', { 'data-experiment': e.id }, el('tr', { class: 'ht-group' }, head), e.lanes.map((l, i) => lane(l, e.lanes[i - 1])));
    }
    function editor(e) {
      const note = form.kind === 'note', back = `[data-experiment="${CSS.escape(e.id)}"] [data-act=${form.kind}]`;
      const box = note ? el('textarea', { rows: 2, maxlength: 100000, 'aria-label': 'Note' }) : el('input', { type: 'text', maxlength: 100, list: 'ht-tags', 'aria-label': 'New tag' });
      if (note) box.value = e.note;
      const save = () => ((note || box.value.trim()) ? act({ do: form.kind, experiments: [e.id], text: box.value }, back) : box.focus());
      const leave = () => { form = null; draw(); root.querySelector(back)?.focus(); };
      box.addEventListener('keydown', (event) => {
        if (event.key === 'Escape') leave();
        if (event.key === 'Enter' && (!note || event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
      });
      return el('div', { class: 'ht-form' }, box, note ? '' : el('datalist', { id: 'ht-tags' }, data.choices.tag.map(([t]) => el('option', { value: t }))),
        button(note ? 'Save note' : 'Add tag', save, { class: 'pe-small' }), button('Cancel', leave, { class: 'pe-small' }));
    }
    function lane(l, above) {
      const pipeline = l.pipeline !== l.name && !l.baseline ? el('span', { class: 'ps-quiet ht-pipeline' }, l.pipeline) : '';
      const cells = l.cells.map((c, i) => el('td', { class: 'num', title: c.what }, c.text ? [el('span', {}, c.text), el('span', { class: 'lr-unit' }, c.unit), el('span', { class: 'ht-ratio' }, c.ratio || ''), c.what !== above?.cells[i].what ? el('span', { class: 'ht-what' }, c.what) : ''] : '–'));
      const remarks = [l.status !== 'finished' ? l.status : '', ...l.flags].filter(Boolean).join('; ');
      return el('tr', {}, el('th', { scope: 'row' }, el('label', { class: 'ht-lane' }, check([l.id], `Pick ${l.name}`), el('span', {}, l.name, pipeline))), cells, el('td', { class: 'ht-remarks' }, remarks));
    }

    watch('value', () => {
      const wanted = props.value?.picked || [];
      if (JSON.stringify(wanted) !== JSON.stringify(picked)) { picked = [...wanted]; if (data) draw(); }
    });
    watch('names', drawTray);
    watch('reload', load);
    PS.whenShown(root, async () => { await load(); pickAgain(); });
    root.dataset.ready = '1';
  };
})();
