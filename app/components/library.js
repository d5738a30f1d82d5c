// The library: methods by stage at the left, the chosen one's page at the right. Cards enter as text.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const SIGNS = { better: '▲', worse: '▼', 'no clear difference': '≈', same: '=' };

  PS.mountLibrary = (root, props, server) => {
    const list = root.querySelector('.ml-list'), page = root.querySelector('.ml-page');
    let chosen = '', asked = 0;
    const search = el('input', { type: 'search', placeholder: 'Search methods', 'aria-label': 'Search methods', class: 'ml-search' });
    const place = el('div', { class: 'ml-items' });
    search.addEventListener('input', draw);
    list.append(search, place);

    function draw() {
      const wanted = search.value.trim().toLowerCase(), shown = props.shelf.filter((m) => `${m.id} ${m.title} ${m.summary} ${m.group}`.toLowerCase().includes(wanted));
      const groups = [...new Set(shown.map((m) => m.group))];
      place.replaceChildren(...groups.flatMap((g) => [el('h2', {}, g), el('ul', { role: 'list' }, shown.filter((m) => m.group === g).map((m) => el('li', {},
        button(m.title, () => open(m.id, true), { class: 'ml-item', 'data-method': m.id, 'aria-current': m.id === chosen ? 'page' : false })))) ]), shown.length ? '' : el('p', { class: 'ps-quiet' }, 'No method fits this search.'));
    }
    async function open(id, move) {
      chosen = id;
      for (const b of place.querySelectorAll('[data-method]')) { if (b.dataset.method === id) b.setAttribute('aria-current', 'page'); else b.removeAttribute('aria-current'); }
      const mine = ++asked, found = await server.open_method(id).catch(() => ({ error: 'The studio did not answer; try again.' }));
      if (mine !== asked) return;
      if (found.error) return page.replaceChildren(el('p', { class: 'ps-note ps-note-error' }, found.error));
      page.replaceChildren(...method(found, open));
      page.dataset.method = id;
      if (move) { page.focus({ preventScroll: true }); page.scrollIntoView({ block: 'nearest' }); }
    }
    draw();
    if (!props.shelf.length) page.replaceChildren(el('p', { class: 'ps-empty' }, 'The catalogue holds no methods.'));
    PS.whenShown(root, () => { if (props.shelf.length) open(chosen || props.shelf[0].id, false); });
    root.dataset.ready = '1';
  };

  const section = (title, ...content) => el('section', { class: 'ml-section' }, el('h3', {}, title), ...content);
  /** ``word`` becomes code; everything stays text. */
  const prose = (text) => text.split('``').map((piece, i) => (i % 2 ? el('code', {}, piece) : piece));
  const { table } = PS;

  function method(m, open) {
    return [
      el('header', {}, el('h2', {}, m.title), el('p', { class: 'ml-summary' }, m.summary),
        el('p', { class: 'ps-quiet' }, m.paper.link ? el('a', { href: m.paper.link, target: '_blank', rel: 'noopener noreferrer' }, m.paper.text) : m.paper.text || 'No paper: common practice.', ` · ${m.kind} · id `, el('code', {}, m.id))),
      m.unavailable ? el('p', { class: 'ps-note ps-note-warning' }, `Cannot run on this machine: ${m.unavailable}`) : '',
      m.stage ? stages(m) : '',
      m.try ? el('p', {}, el('a', { class: 'ps-button ml-try', href: `?${new URLSearchParams({ p: m.try })}` }, `Open a lane with ${m.title} in the Studio`)) : '',
      ...(m.doc.length ? [section('What it does', m.doc.map((p) => el('p', {}, prose(p))))] : []),
      section('At a glance', el('dl', { class: 'ps-facts' }, m.facts.map(([label, text]) => el('div', {}, el('dt', {}, label), el('dd', {}, text))))),
      section('Knobs', m.knobs.length ? table('Knobs', ['Knob', 'Which way it moves things', 'Allowed', 'Default', 'Like the baseline at'], m.knobs.map((k) => [el('code', {}, k.name), k.help || '–', k.allowed, k.default, k.neutral || '–'])) : el('p', { class: 'ps-quiet' }, 'It has no knobs: it is on or off.')),
      m.kind !== 'policy' ? '' : section('What moves', m.moves.length ? el('ul', {}, m.moves.map((x) => el('li', {}, `${x.metric} ${x.way} `, el('span', { class: 'ps-quiet' }, `(${x.how})`)))) : el('p', { class: 'ps-quiet' }, 'Nothing is promised.')),
      m.kind !== 'policy' ? '' : section('What it touches', m.resources.length ? el('ul', {}, m.resources.map((r) => el('li', {}, el('strong', {}, r.mode), `: ${r.what} `, el('span', { class: 'ps-quiet' }, `(${r.resource}${r.when ? `, with ${r.when}` : ''})`)))) : el('p', { class: 'ps-quiet' }, 'Nothing that another policy could want.')),
      section('Cannot stand with', m.conflicts.length ? el('ul', {}, m.conflicts.map((c) => el('li', {}, button(c.title, () => open(c.id, true), { class: 'dt-pick' }), c.only ? ` ${c.only}` : '', el('span', { class: 'ps-quiet' }, ` ${c.why}.`)))) : el('p', { class: 'ps-quiet' }, m.kind === 'policy' ? 'It stands with every other policy of the catalogue.' : 'It is no part of pipelines.')),
      section('Runs here', ...runs(m))];
  }

  const stages = (m) => el('ol', { class: 'ml-stages', 'aria-label': `Stages of a pipeline; ${m.title} acts at ${m.stage}` }, m.stages.map((s) => el('li', { class: s === m.stage ? 'ml-here' : '', 'aria-current': s === m.stage ? 'step' : false }, s)));

  function runs(m) {
    if (!m.runs.rows.length) return [el('p', { class: 'ps-empty' }, m.runs.summary || `No run has used ${m.title} yet. Open a lane with it in the Studio and press Run; what comes out is listed here, good or bad.`)];
    const ratio = (r) => el('span', { class: `ml-ratio ml-${r.verdict === 'worse' ? 'worse' : 'plain'}` }, `${r.metric} `, el('span', { class: 'num' }, r.text), r.interval ? el('span', { class: 'ps-quiet' }, ` ${r.interval}`) : '', SIGNS[r.verdict] ? el('span', { class: 'lr-sign', role: 'img', 'aria-label': r.verdict, title: r.verdict }, ` ${SIGNS[r.verdict]}`) : '', r.verdict === 'worse' ? ' worse' : '');
    return [el('p', { class: 'ps-quiet ml-count' }, m.runs.summary), table(`Runs with ${m.title}`, ['Run', 'Model and workload', 'Against its reference', 'Remarks'], m.runs.rows.map((r) => [
      [r.name, r.pipeline !== r.name ? el('span', { class: 'ps-quiet ht-pipeline' }, r.pipeline) : '', el('span', { class: 'ps-quiet ml-when' }, r.when)], `${r.model} · ${r.workload}`,
      r.ratios.length ? r.ratios.map(ratio) : '–', [r.status !== 'finished' ? r.status : '', ...r.flags].filter(Boolean).join('; ') || '–']))];
  }
})();
