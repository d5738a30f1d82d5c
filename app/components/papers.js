// The reading list and its claims: search, filter, open a claim, check it, read its verdicts. Everything enters as text.
(() => {
  const PS = window.ParetoStudio, { el, button, table } = PS;
  const LOOK_EVERY_MS = 600, FILTERS = { all: 'All', runs: 'Runs here', claim: 'Has a claim' };
  const SIGNS = { reproduced: '✓', 'direction only': '↗', 'not shown': '✗', 'cannot be shown on this hardware': '–' };
  const SILENT = { error: 'The studio did not answer; try again.' };

  PS.mountPapers = (root, props, server) => {
    const bar = root.querySelector('.pp-bar'), place = root.querySelector('.pp-place'), say = PS.announcer(root.querySelector('.pp-said'));
    const search = el('input', { type: 'search', placeholder: 'Search papers', 'aria-label': 'Search papers', class: 'ml-search' });
    const count = el('p', { class: 'ps-quiet pp-count', role: 'status' });
    const none = el('p', { class: 'ps-empty', hidden: true }, 'No paper fits this search and filter.');
    let filter = 'all', shown = [];
    const filters = Object.entries(FILTERS).map(([id, label]) => button(label, () => { filter = id; sift(); }, { 'data-filter': id, 'aria-pressed': id === 'all' }));
    search.addEventListener('input', sift);
    bar.append(search, el('div', { class: 'pp-filters', role: 'group', 'aria-label': 'Show' }, filters), count);

    /** Hide what does not fit; nothing is drawn anew, so an open claim stays as it is. */
    function sift() {
      const words = search.value.trim().toLowerCase().split(/\s+/);
      const fits = ({ paper }) => (filter === 'all' || (filter === 'claim' ? paper.claims.length : paper.runs_as.length)) && words.every((w) => paper.text.includes(w));
      for (const row of shown) row.node.hidden = !fits(row);
      for (const group of place.querySelectorAll('.pp-group')) group.hidden = !group.querySelector('.pp-paper:not([hidden])');
      for (const b of filters) b.setAttribute('aria-pressed', String(b.dataset.filter === filter));
      const listed = shown.filter((r) => r.paper.listed), visible = shown.filter((r) => !r.node.hidden), others = visible.filter((r) => !r.paper.listed).length;
      none.hidden = visible.length > 0;
      count.textContent = `${visible.length - others} of ${listed.length} systems${others ? `, and ${others} ${others === 1 ? 'claim' : 'claims'} on other papers` : ''}`;
    }

    async function load() {
      const found = await server.list_papers({}).catch(() => SILENT);
      if (found.error) return place.replaceChildren(el('p', { class: 'ps-note ps-note-error' }, found.error), button('Try again', load));
      shown = found.papers.map((paper) => ({ paper: { ...paper, text: JSON.stringify([paper.title, paper.facts, paper.summary, paper.status, paper.claims]).toLowerCase() }, node: paperRow(paper) }));
      const groups = [...new Set(found.papers.map((p) => p.group))];
      place.replaceChildren(...groups.map((g) => el('section', { class: 'pp-group' }, el('h2', {}, g), el('ul', { role: 'list' }, shown.filter((r) => r.paper.group === g).map((r) => r.node)))), none);
      sift();
      root.dataset.ready = '1';
    }

    function paperRow(paper) {
      const methods = paper.runs_as.flatMap((m, i) => [i ? ', ' : '', m.link ? el('a', { href: `?${new URLSearchParams({ p: m.link })}`, title: `Open a lane with ${m.id} in the Studio` }, m.id) : m.id]);
      return el('li', { class: 'pp-paper', 'data-paper': paper.id }, el('h3', {}, paper.title), el('p', { class: 'ps-quiet' }, paper.facts.join(' · ')), el('p', { class: 'pp-what' }, paper.summary),
        el('p', { class: methods.length ? 'pp-status' : 'pp-status ps-quiet' }, methods.length ? ['runs here as ', ...methods] : paper.status), paper.claims.map((c) => claimRow(c, paper)));
    }

    function claimRow(claim, paper) {
      const panel = el('div', { class: 'pc', id: PS.uid('claim'), hidden: true, 'data-claim': claim.id });
      const last = el('span', { class: 'pc-last' }), tell = (verdict) => last.replaceChildren(...(verdict ? outcome(verdict) : []));
      const toggle = () => {
        panel.hidden = !panel.hidden;
        opener.setAttribute('aria-expanded', String(!panel.hidden));
        if (!panel.hidden) claimPanel(panel, claim.id, server, props, say, tell);
      };
      const opener = button([paper.listed ? `Claim: ${claim.title}` : 'The claim and its verdicts', last], toggle, { class: 'pc-opener', 'aria-expanded': 'false', 'aria-controls': panel.id });
      tell(claim.verdict);
      if (claim.running) toggle();                                          // also after a reload
      return el('div', {}, opener, panel);
    }

    let asked = false;
    PS.whenShown(root, () => { if (!asked) { asked = true; load(); } });
  };

  const outcome = (word) => [el('span', { 'aria-hidden': 'true', class: 'ps-mark' }, SIGNS[word] || ''), ` ${word}`];
  const section = (title, ...content) => el('section', { class: 'ml-section' }, el('h4', {}, title), ...content);
  const reference = (r) => (r.link ? el('a', { href: r.link, target: '_blank', rel: 'noopener noreferrer' }, r.text) : r.text);

  /** Fill the panel of one claim and keep it up to date while the claim is being checked. */
  async function claimPanel(panel, id, server, props, say, tell) {
    const ask = (name, more) => server[name]({ claim: id, ...PS.visitor(), ...more }).catch(() => SILENT);
    const found = await ask('open_claim');
    if (found.error) return panel.replaceChildren(el('p', { class: 'ps-note ps-note-error' }, found.error));
    let spoken = '', mine = (panel.__turn = (panel.__turn || 0) + 1);       // an older look at the same panel stops by itself
    const device = props.devices.length > 1 ? el('select', { 'aria-label': 'Device' }, props.devices.map((d) => el('option', { value: d }, d))) : null;
    const check = button('Check this claim', begin, { class: 'pc-check' }), state = el('div', { class: 'pc-state' }), verdicts = el('div', { class: 'pc-verdicts' });
    panel.replaceChildren(el('p', { class: 'pc-headline' }, found.headline), el('p', { class: 'ps-quiet' }, 'From the ', found.source, '; ', reference(found.reference)),
      el('p', { class: 'pc-run' }, check, device ? ['on ', device] : '', el('span', { class: 'ps-quiet' }, `runs ${found.runs.length} ${found.runs.length === 1 ? 'experiment' : 'experiments'}, ${found.takes}`)),
      state, verdicts, ...details(found));
    drawVerdicts(verdicts, found.verdicts);
    show(found.state.running || found.state.mine ? found.state : {});       // how somebody else's check ended is no news
    if (found.state.running) follow();

    async function begin() {
      check.disabled = true;
      const answer = await ask('begin_claim', { device: device ? device.value : props.devices[0] });
      if (answer.error) { check.disabled = false; return note(answer.error, 'error'); }
      show(answer.state);
      state.querySelector('button')?.focus();
      follow();
    }

    async function follow() {
      for (;;) {
        await new Promise((wake) => { setTimeout(wake, LOOK_EVERY_MS); });
        if (!panel.isConnected || panel.__turn !== mine) return;
        const answer = await ask('claim_state');
        if (answer.error) { say(answer.error); continue; }
        if (answer.state.running) { show(answer.state); continue; }
        return ended(answer.state);
      }
    }

    async function ended(now) {
      const focused = state.contains(document.activeElement), again = await ask('open_claim');
      if (panel.__turn !== mine) return;
      show(now);
      if (again.error) return note(again.error, 'error');
      drawVerdicts(verdicts, again.verdicts);
      tell(again.verdicts[0]?.verdict);
      if (!now.message && again.verdicts.length) say(`Verdict: ${again.verdicts[0].verdict}. ${again.verdicts[0].text}`);
      if (focused) (now.message ? check : verdicts.querySelector('h5') || check).focus({ preventScroll: true });
    }

    function note(text, tone) {
      state.replaceChildren(el('p', { class: `ps-note ps-note-${tone}`, role: tone === 'error' ? 'alert' : 'status' }, text));
    }

    function show(now) {
      check.disabled = now.running;
      if (!now.running) return now.message ? note(now.message, now.failed ? 'error' : 'info') : state.replaceChildren();
      const bar = state.querySelector('progress') || el('progress', { max: 1, 'aria-label': 'Progress of the check' });
      if (!bar.isConnected) {
        const cancel = now.mine ? button('Cancel', async () => { const a = await ask('cancel_claim'); state.querySelector('.pc-now').textContent = a.error || a.message; }, { 'aria-label': 'Cancel this check' }) : '';
        state.replaceChildren(bar, el('p', { class: 'pc-line' }, el('span', { class: 'pc-now' }), cancel));
      }
      if (now.done === null || now.done === undefined) bar.removeAttribute('value'); else bar.value = now.done;
      state.querySelector('.pc-now').textContent = now.text;
      const stage = now.text.split(/[,:]/)[0];
      if (stage !== spoken) { spoken = stage; say(stage); }
    }
  }

  function details(c) {
    return [
      section('What must hold', table('What must hold', ['It must hold that', 'Compared', 'Asked for', 'Where the limit comes from'], c.checks.map((k) => [
        [k.text, k.headline ? '' : el('span', { class: 'ps-quiet' }, ' (beside the headline)')], [k.compared, el('span', { class: 'ps-quiet' }, ` ${k.where}`)], k.asked, k.source])),
      el('p', { class: 'ps-quiet' }, `The limits were set on ${c.set}. Every change of them: `), el('ul', {}, c.log.map(([date, reason]) => el('li', {}, `${date}: ${reason}`)))),
      section('What runs', table('What runs', ['Experiment', 'Workload', 'Settings', 'Model', 'Lanes'], c.runs.map((r) => [r.id, r.workload, r.settings || '–', r.model, r.lanes.map((l) => el('code', { class: 'pc-lane' }, l))]))),
      section('Said honestly', el('p', {}, c.fallback), c.unchecked.length ? el('p', {}, `Not checked, so the verdict is "direction only" at best: ${c.unchecked.join('; ')}.`) : '')];
  }

  function drawVerdicts(place, list) {
    const [latest, ...earlier] = list;
    place.replaceChildren(latest ? section('Latest verdict', verdict(latest)) : el('p', { class: 'ps-empty' }, 'No verdict yet. Check the claim; what comes out is kept here, whatever it is.'),
      earlier.length ? el('details', { class: 'pc-earlier' }, el('summary', {}, `Earlier verdicts (${earlier.length})`), earlier.map(verdict)) : '');
  }

  function verdict(v) {
    const rows = v.checks.map((c) => [[c.text, c.headline ? '' : el('span', { class: 'ps-quiet' }, ' (beside the headline)')], outcome(c.outcome),
      [`${c.metric} `, el('span', { class: 'num' }, c.value)], [c.interval || '–', c.n ? el('span', { class: 'ps-quiet' }, ` n = ${c.n}`) : ''], c.asked, c.reason || '–']);
    return el('article', { class: 'pc-verdict', 'data-verdict': v.verdict }, el('h5', { tabindex: -1 }, outcome(v.verdict), el('span', { class: 'ps-quiet' }, ` ${v.when}, ${v.where}`)), el('p', {}, v.text),
      v.changed ? el('p', { class: 'ps-note ps-note-warning' }, v.changed) : '', rows.length ? table(`Checks of the verdict of ${v.when}`, ['Check', 'Outcome', 'Found', '95 % interval', 'Asked for', 'Why not more'], rows) : '',
      el('p', { class: 'ps-quiet' }, 'Runs: ', v.runs.flatMap(([name, run], i) => [i ? ', ' : '', name ? `${name} ` : '', el('code', {}, run)])));
  }
})();
