// Parts of the editor that hold no state: problem notes, the form of one step, the line below the lanes.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;

  /** One problem with its mend, as a note under what causes it. */
  PS.problemNote = (problem, mend) => el('div', { class: 'pe-problem', 'data-problem': problem.knob || '' },
    el('span', { class: 'pe-problem-sign', 'aria-hidden': 'true' }, '!'),
    el('span', {}, problem.message),
    problem.mend ? button(problem.mend.label || 'Mend', () => mend(problem), { class: 'pe-small pe-mend' }) : null);

  /** Put the problems in place without touching what one is typing into or pressing. */
  PS.patchProblems = (root, state, checks, mend) => {
    state.lanes.forEach((lane, i) => {
      const problems = checks.lanes?.[i + 1] || [], section = root.querySelector(`[data-lane="${lane.id}"]`);
      lane.steps.forEach((step, at) => {
        const node = section?.querySelector(`[data-step="${step.id}"]`), mine = problems.filter((p) => p.step === at);
        if (!node) return;
        node.classList.toggle('pe-bad', mine.length > 0);
        notes(node, node.querySelector('.pe-row'), mine, mend);
      });
      if (section) notes(section, section.querySelector('[data-steps]'), problems.filter((p) => p.step === null || p.step >= lane.steps.length), mend);
    });
  };
  function notes(parent, after, problems, mend) {
    let box = [...parent.children].find((n) => n.classList.contains('pe-notes'));
    if (!box) { box = el('div', { class: 'pe-notes' }); after.after(box); }
    PS.redraw(box, problems, () => problems.map((p) => PS.problemNote(p, mend)));
  }

  /** What a policy does, its knobs, and a sweep for each knob that can be swept. */
  PS.stepForm = (step, card, { set, sweep }) => {
    const sweepable = (kind) => kind.enum || ['integer', 'number', 'boolean'].includes(kind.type);
    return el('div', {},
      el('p', { class: 'ps-help' }, card.summary, card.paper ? ` (${card.paper})` : ''),
      effectsLine(card),
      PS.schemaForm(card.knobs, step.knobs, set, (name, kind) => (sweepable(kind) ? sweepField(name, kind, step, sweep) : null)));
  };

  function effectsLine(card) {
    const say = (entries, word) => entries.map(([name, way]) => `${name.replaceAll('_', ' ')} ${{ up: '↑', down: '↓', same: '=' }[way]}${word}`);
    const parts = [...say(Object.entries(card.effects || {}), ''), ...say(Object.entries(card.hopes || {}), ' (hoped)')];
    return parts.length ? el('p', { class: 'ps-help pe-effects' }, parts.join(' · ')) : null;
  }

  function sweepField(name, kind, step, sweep) {
    const words = (kind.title || name).replaceAll('_', ' ');
    const box = el('input', { type: 'text', 'aria-label': `Values of ${words} to sweep, separated by commas` });
    box.value = suggested(kind, step.knobs[name]).join(', ');
    const go = () => {
      const values = box.value.split(',').map((v) => v.trim()).filter(Boolean).map((v) => (kind.type === 'boolean' ? v === 'true' : PS.scalar(v, kind.type)));
      if (values.length) sweep(name, values);
    };
    box.addEventListener('keydown', (e) => { if (e.key === 'Enter') go(); });
    return el('details', { class: 'pe-sweep' }, el('summary', {}, `Sweep ${words}`),
      el('div', { class: 'pe-sweep-row' }, box, button('Make lanes', go, { class: 'pe-small', 'aria-label': `Make one lane per value of ${words}` })));
  }

  function suggested(kind, now) {
    if (kind.enum) return kind.enum;
    if (kind.type === 'boolean') return [true, false];
    const low = kind.minimum ?? kind.exclusiveMinimum, high = kind.maximum ?? kind.exclusiveMaximum, base = now ?? kind.default;
    if (typeof base !== 'number') return [];
    const tries = [base, base / 2, base * 2].map((v) => (kind.type === 'integer' ? Math.round(v) : Number(v.toPrecision(3))));
    return [...new Set(tries)].filter((v) => (low === undefined || v >= low) && (high === undefined || v <= high)).sort((a, b) => a - b);
  }

  /** Below the lanes: undo, and what is wrong with the experiment as a whole. */
  PS.editorFooter = (root, { state, most, general, mend, undo }) => PS.redraw(root.querySelector('.pe-general'), [state.canUndo, state.full, general], () => [
    button('Undo', undo, { class: 'pe-small', disabled: !state.canUndo }),
    el('span', { class: 'ps-quiet' }, state.full ? `${most} lanes beside the baseline are the most that can run together.` : ''),
    ...general.map((p) => PS.problemNote(p, mend))]);
})();
