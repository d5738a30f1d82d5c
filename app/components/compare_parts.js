// The difference of two runs, the SQL box, files out and in. Everything from Python enters as text.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const SIGNS = { better: '▲', worse: '▼', 'no clear difference': '≈', same: '=' };
  const problem = (text) => el('p', { class: 'ps-note ps-note-error' }, text);

  // ---- two runs ----
  PS.mountDiff = (root, props, watch, server) => {
    const choose = root.querySelector('.rd-choose'), body = root.querySelector('.rd-body'), say = PS.announcer(root.querySelector('[role=status]'));
    let a = '', b = '', asked = 0;

    function controls(runs) {
      PS.redraw(choose, [runs, a, b], () => [el('h2', {}, 'Two runs side by side'), el('div', { class: 'rd-selects' },
        [['A', a, (v) => { a = v; }], ['B', b, (v) => { b = v; }]].map(([label, value, set]) => el('label', {}, el('span', {}, label),
          el('select', { 'aria-label': `Run ${label}`, on: { change: (e) => { set(e.target.value); show(); } } }, runs.map((r) => el('option', { value: r.id, selected: r.id === value }, `${r.mark} ${r.name}`))))),
        button('Swap', () => { [a, b] = [b, a]; show(); choose.querySelector('button')?.focus(); }, { class: 'pe-small' }))]);
    }
    async function show() {
      const runs = props.value?.runs || [], mine = ++asked;
      if (runs.length < 2) {
        choose.replaceChildren(el('h2', {}, 'Two runs side by side'));
        choose.__shown = null;
        body.replaceChildren(el('p', { class: 'ps-empty' }, 'Pick two or more runs above to see their settings, environment and results side by side.'));
        return;
      }
      controls(runs);
      const answer = await server.diff_runs({ runs: runs.map((r) => r.id), a, b }).catch(() => ({ error: 'The studio did not answer; try again.' }));
      if (mine !== asked) return;
      body.replaceChildren(...(answer.error ? [problem(answer.error)] : [...answer.notes.map((n) => el('p', { class: 'ps-note ps-note-warning' }, n)), ...answer.sections.map((s) => section(s, answer))]));
      if (body.dataset.shown !== `${a} ${b}` && !answer.error) say(`Showing ${answer.a.name} against ${answer.b.name}`);
      body.dataset.shown = `${a} ${b}`;
    }
    function section(s, answer) {
      const side = (run, letter) => el('th', { scope: 'col', class: s.numbers ? 'num' : '' }, PS.laneMark(run), ` ${letter}: ${run.name}`);
      const head = el('tr', {}, el('th', { scope: 'col' }, s.numbers ? 'Metric' : 'Setting'), side(answer.a, 'A'), side(answer.b, 'B'), s.numbers ? [el('th', { scope: 'col', class: 'num' }, 'B / A'), el('th', { scope: 'col' }, 'Paired test')] : []);
      const shown = s.numbers ? s.rows : s.rows.filter((r) => r.differs), equal = s.numbers ? [] : s.rows.filter((r) => !r.differs);
      const row = (r) => el('tr', { class: r.differs && !s.numbers ? 'rd-differs' : '', 'data-name': r.metric || r.name }, el('th', { scope: 'row' }, r.name), el('td', { class: s.numbers ? 'num' : '' }, r.a), el('td', { class: s.numbers ? 'num' : '' }, r.b),
        s.numbers ? [el('td', { class: 'num' }, SIGNS[r.verdict] ? el('span', { class: 'lr-sign', role: 'img', 'aria-label': r.verdict, title: r.verdict }, SIGNS[r.verdict]) : '', ` ${r.ratio}`, r.interval ? el('span', { class: 'ps-quiet' }, ` ${r.interval}`) : ''), el('td', { class: 'rd-test' }, r.test)] : []);
      const table = (rows, label) => el('div', { class: 'dt-scroll', tabindex: 0, role: 'region', 'aria-label': label }, el('table', { class: 'dt' }, el('thead', {}, head.cloneNode(true)), el('tbody', {}, rows.map(row))));
      return el('div', { class: 'rd-section' }, el('h3', {}, s.title), s.same ? el('p', { class: 'ps-quiet' }, s.same) : '', shown.length ? table(shown, s.title) : '',
        equal.length ? el('details', {}, el('summary', {}, `Equal in both (${equal.length})`), table(equal, `${s.title}, equal in both`)) : '');
    }
    watch('value', () => {
      const value = props.value || {}, ids = (value.runs || []).map((r) => r.id);
      if (value.a) a = value.a;
      if (value.b) b = value.b;
      if (!ids.includes(a)) a = ids[0] || '';
      if (!ids.includes(b) || a === b) b = ids.find((id) => id !== a) || '';
      show();
    });
    show();
    root.dataset.ready = '1';
  };

  // ---- SQL ----
  PS.mountSql = (root, props, server) => {
    const answer = root.querySelector('.sq-answer'), told = root.querySelector('.sq-said');
    const box = el('textarea', { rows: 4, spellcheck: 'false', 'aria-label': 'SQL query' });
    const go = button('Run query', run, { class: 'ps-button' });
    box.value = props.examples[0][1];
    box.addEventListener('keydown', (e) => { if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) { e.preventDefault(); run(); } });
    async function run() {
      go.disabled = true;
      told.replaceChildren(el('p', { class: 'ps-quiet' }, 'Running…'));
      const found = await server.run_query(box.value).catch(() => ({ error: 'The studio did not answer; try again.' }));
      go.disabled = false;
      told.replaceChildren(found.error ? problem(found.error) : el('p', { class: 'ps-quiet' }, found.note));
      answer.replaceChildren(!found.error && found.rows.length ? PS.dataTable({ head: found.columns, rows: found.rows }, null, 'Result of the query') : '');
    }
    root.querySelector('.sq-ask').append(
      el('p', { class: 'ps-quiet' }, 'One SELECT over a copy of the history: experiments, runs, metrics, ratios, outputs, kept, messages, tags, notes, verdicts, imports, and results (one row per lane and metric). Ctrl+Enter runs it.'),
      el('div', { class: 'sq-examples', role: 'group', 'aria-label': 'Example queries' }, props.examples.map(([title, sql]) => button(title, () => { box.value = sql; box.focus(); }, { class: 'pe-small' }))), box, go);
    root.dataset.ready = '1';
  };

  // ---- files ----
  PS.mountFiles = (root, props, trigger, watch, server) => {
    const place = root.querySelector('.rf-buttons'), said = root.querySelector('.rf-said');
    const say = (text, tone) => said.replaceChildren(el('p', { class: `ps-note ps-note-${tone}` }, text));
    const picked = () => props.value?.picked || [];

    async function save(kind) {
      const found = await server.export_file({ kind, picked: picked() }).catch(() => ({ error: 'The studio did not answer; try again.' }));
      if (found.error) return say(found.error, 'error');
      for (const file of found.files) {
        const bytes = Uint8Array.from(atob(file.base64), (c) => c.charCodeAt(0)), address = URL.createObjectURL(new Blob([bytes], { type: file.mime }));
        const link = el('a', { href: address, download: file.name });
        document.body.append(link);
        link.click();
        link.remove();
        setTimeout(() => URL.revokeObjectURL(address), 10000);
      }
      say(`Saved ${found.files.map((f) => f.name).join(', ')}.`, 'info');
    }
    const chooser = el('input', { type: 'file', accept: '.json,application/json', hidden: true, 'aria-label': 'Run card to import', on: { change: take } });
    async function take() {
      const [file] = chooser.files;
      if (!file) return;
      chooser.value = '';
      if (file.size > props.most_bytes) return say(`${file.name} has ${Math.round(file.size / 1e6)} MB; a run card has at most ${Math.round(props.most_bytes / 1e6)} MB, so this is something else.`, 'error');
      say(`Reading ${file.name}…`, 'info');
      const base64 = await new Promise((resolve) => { const reader = new FileReader(); reader.onload = () => resolve(String(reader.result).split(',')[1] || ''); reader.readAsDataURL(file); });
      const found = await server.import_file({ name: file.name, base64 }).catch(() => ({ error: 'The studio did not answer; try again.' }));
      if (found.error) return say(found.error, 'error');
      say(found.message, 'info');
      trigger('upload');
    }
    const exports = [['CSV', 'csv'], ['Parquet', 'parquet'], ['Run card', 'card'], ['Python script', 'script']].map(([label, kind]) => button(label, () => save(kind), { class: 'ps-button' }));
    const draw = () => exports.forEach((b) => { b.disabled = !picked().length; });
    place.append(el('span', { class: 'ps-label' }, 'Save the picked runs as'), ...exports, button('Import a run card…', () => chooser.click(), { class: 'ps-button' }), chooser);
    watch('value', draw);
    draw();
    root.dataset.ready = '1';
  };
})();
