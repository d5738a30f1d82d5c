// Palette and lanes. State first: PS.pipelines holds the truth, the DOM is redrawn from it.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;

  PS.mountEditor = (root, props, trigger, watch, server) => {
    const state = PS.pipelines(props.catalog, props.style.most), say = PS.announcer(root.querySelector('.pe-live'));
    const places = { palette: root.querySelector('.pe-palette-list'), lanes: root.querySelector('.pe-lanes'), shelf: root.querySelector('.pe-shelf') };
    const search = root.querySelector('.pe-search');
    let active = state.lanes[0].id, open = null, grabbed = null, rev = 0, saved = [];
    let checks = { lanes: [], fits: {} }, asked = 0;

    const style = (number) => PS.laneStyle(number, props.style);
    const laneTitle = (lane) => lane.name || `Lane ${style(state.lanes.indexOf(lane) + 1).letter}`;
    const activeLane = () => state.laneOf(active) || state.lanes[state.lanes.length - 1];
    const where = (lane, at) => `step ${at + 1} of ${lane.steps.length} in ${laneTitle(lane)}`;

    // ---- what changed goes to Python and is checked there ----
    function changed(focus, sentence) {
      active = activeLane().id;
      props.value = { lanes: state.export(), rev: ++rev };
      draw(focus);
      if (sentence) say(sentence);
      check();
    }
    // The answer only adds and removes notes: lanes are not redrawn, so nobody loses the focus or a click.
    const check = () => { root.dataset.checks = 'pending'; ask(); };
    const ask = PS.framed(async () => {
      const mine = ++asked;
      const answer = await server.check({ lanes: state.export(), setup: props.setup || {} });
      if (mine !== asked) return;                             // an answer to an older question
      if (answer) {
        checks = answer;
        drawPalette();
        PS.patchProblems(root, state, checks, mend);
        drawFooter();
      }
      root.dataset.checks = 'done';
    });
    function focusNow() {
      const node = document.activeElement;
      if (!root.contains(node)) return null;
      return { step: node.closest('[data-step]')?.dataset.step, lane: node.closest('[data-lane]')?.dataset.lane, act: node.dataset.act, field: node.closest('[data-field]')?.dataset.field };
    }

    // ---- actions ----
    function add(policy, laneId, at, byKeys) {
      const { step, place, lane } = state.insert(laneId, policy, at);
      active = lane.id;
      open = step.id;
      changed(byKeys ? { step: step.id, act: 'grab' } : null, `${state.title(policy)} added as ${where(lane, place)}`);
    }
    function move(stepId, laneId, at, focus) {
      const from = state.find(stepId), done = state.move(stepId, laneId, at);
      if (!done) return say(`${state.title(from.step.policy)} stays where it is: its stage fixes the place`);
      active = laneId;
      changed(focus, `${state.title(done.step.policy)} moved to ${where(done.lane, done.place)}`);
    }
    function remove(stepId) {
      const gone = state.remove(stepId);
      if (!gone) return;
      const next = gone.lane.steps[gone.at] || gone.lane.steps[gone.at - 1];
      changed(next ? { step: next.id, act: 'grab' } : { lane: gone.lane.id, act: 'target' }, `${state.title(gone.step.policy)} removed from ${laneTitle(gone.lane)}`);
    }
    function load(pipeline, what) {
      const { lane, how } = state.load(pipeline, active);
      active = lane.id;
      open = null;
      changed(null, `${what} ${how}`);
    }
    function mend(problem) {
      const { action, step, knob, value } = problem.mend, at = state.lanes[problem.lane - 1]?.steps[step];
      if (action === 'experiment') return trigger('edit', { field: knob, value });
      if (!at) return;
      if (action === 'remove') return remove(at.id);
      state.setKnob(at.id, knob, value);
      changed({ step: at.id, act: 'open' }, problem.mend.label);
    }
    async function save(lane) {
      const pipeline = state.export()[state.lanes.indexOf(lane)];
      const answer = await server.save_pipeline({ ...pipeline, name: lane.name || lane.steps.map((s) => s.policy).join(' + ') });
      if (answer.saved) saved = answer.saved;
      drawShelf();
      say(answer.message);
    }
    async function forget(name) {
      saved = (await server.forget_pipeline(name)).saved;
      drawShelf();
      say(`${name} is no longer saved`);
    }

    // ---- drawing ----
    function draw(focus) {
      if (dragger.active) return;
      drawPalette();
      places.lanes.replaceChildren(baseline(), ...state.lanes.map(drawLane), addLaneButton());
      PS.patchProblems(root, state, checks, mend);
      drawFooter();
      if (focus) refocus(focus);
    }
    const drawFooter = () => PS.editorFooter(root, { state, most: props.style.most, general: checks.general || [], mend, undo: () => { state.undo(); changed(null, 'Undone'); } });
    function refocus({ step, lane, act, field }) {
      const scope = step ? root.querySelector(`[data-step="${step}"]`) : lane ? root.querySelector(`[data-lane="${lane}"]`) : root;
      const target = (field && scope?.querySelector(`[data-field="${field}"] :is(input,select,textarea)`)) || scope?.querySelector(`[data-act="${act}"]`) || (step && scope?.querySelector('[data-act=grab]'));
      target?.focus({ preventScroll: true });
    }
    function drawPalette() {
      if (dragger.active) return;
      const wanted = search.value.trim().toLowerCase(), lane = activeLane();
      const hit = (card) => !wanted || `${card.id} ${card.title} ${card.summary} ${card.stage} ${card.paper}`.toLowerCase().includes(wanted);
      const groups = props.catalog.stages.map((stage) => [stage, props.catalog.cards.filter((card) => card.stage === stage && hit(card))]).filter(([, cards]) => cards.length);
      PS.redraw(places.palette, [wanted, checks.fits, laneTitle(lane)], () => (groups.length
        ? groups.map(([stage, cards]) => el('section', { 'aria-label': `${stage} policies` }, el('h3', {}, stage), el('ul', { role: 'list' }, cards.map((card) => paletteItem(card, lane)))))
        : [el('p', { class: 'ps-quiet' }, wanted ? 'No policy matches. Clear the search to see all.' : 'The catalogue is empty.')]));
    }
    function paletteItem(card, lane) {
      const reason = checks.fits?.[card.id];
      return el('li', { class: `pe-card${reason ? ' pe-unfit' : ''}`, 'data-policy': reason ? false : card.id, title: card.summary },
        el('span', { class: 'pe-handle', 'aria-hidden': 'true' }, '⠿'),
        el('span', { class: 'pe-card-text' }, el('span', { class: 'pe-title' }, card.title), reason ? el('span', { class: 'pe-reason' }, reason) : null),
        button('+', (e) => add(card.id, activeLane().id, Infinity, e.detail === 0), { class: 'pe-icon', disabled: Boolean(reason), 'data-act': `add-${card.id}`, 'aria-label': `Add ${card.title} to ${laneTitle(lane)}` }));
    }
    const baseline = () => el('section', { class: 'pe-lane pe-baseline', 'aria-label': 'Baseline lane' },
      el('header', {}, PS.laneMark(style(0)), el('span', { class: 'pe-lane-name' }, 'Baseline')),
      el('p', { class: 'ps-quiet' }, 'The model as it is. Every other lane is compared with it.'));
    const addLaneButton = () => (state.full ? '' : button('+ Add a lane', () => {
      const lane = state.addLane();
      active = lane.id;
      changed({ lane: lane.id, act: 'target' }, `${laneTitle(lane)} added`);
    }, { class: 'ps-button pe-add-lane' }));

    function drawLane(lane, i) {
      const look = style(i + 1);
      const name = el('input', { class: 'pe-lane-name', 'aria-label': `Name of lane ${look.letter}`, placeholder: `Lane ${look.letter}`, maxlength: 200, 'data-act': 'name' });
      name.value = lane.name;
      name.addEventListener('change', () => { state.rename(lane.id, name.value); changed(focusNow(), ''); });
      const isActive = lane.id === activeLane().id;
      const steps = el('ol', { role: 'list', 'data-steps': lane.id, class: lane.steps.length ? '' : 'pe-empty' }, lane.steps.map((step, at) => drawStep(lane, step, at)));
      return el('section', { class: `pe-lane${isActive ? ' pe-active' : ''}`, 'data-lane': lane.id, style: `--lane:${look.colour}`, 'aria-label': `Lane ${look.letter}: ${lane.name || 'no name'}` },
        el('header', {}, PS.laneMark(look), name),
        steps,
        el('footer', {},
          button(isActive ? 'Adding here' : 'Add here', () => { active = lane.id; draw({ lane: lane.id, act: 'target' }); say(`Policies are now added to ${laneTitle(lane)}`); }, { class: 'pe-small', 'data-act': 'target', 'aria-pressed': String(isActive) }),
          button('Copy', () => { const copy = state.copyLane(lane.id); active = copy.id; changed({ lane: copy.id, act: 'target' }, `${laneTitle(lane)} copied`); }, { class: 'pe-small', disabled: state.full, 'aria-label': `Copy ${laneTitle(lane)}` }),
          button('Save', () => save(lane), { class: 'pe-small', disabled: !lane.steps.length, 'aria-label': `Save ${laneTitle(lane)}` }),
          button('✕', () => { const gone = laneTitle(lane); state.removeLane(lane.id); changed({ lane: activeLane().id, act: 'target' }, `${gone} removed`); }, { class: 'pe-icon pe-drop-lane', title: 'Remove the lane', 'aria-label': `Remove ${laneTitle(lane)}` })));
    }
    function drawStep(lane, step, at) {
      const title = state.title(step.policy), card = state.cards[step.policy], isOpen = open === step.id, held = grabbed?.id === step.id;
      const place = where(lane, at), id = `${step.id}-form`;
      return el('li', { class: `pe-step${held ? ' pe-held' : ''}`, 'data-step': step.id },
        el('div', { class: 'pe-row' },
          button('⠿', null, { class: 'pe-handle', 'data-act': 'grab', 'aria-label': `Move ${title}, ${place}`, 'aria-describedby': 'pe-keys', 'aria-pressed': String(held) }),
          button([el('span', { class: 'pe-title' }, `${at + 1}. ${title}`), el('span', { class: 'pe-knobs' }, PS.knobText(step) || (card ? 'defaults' : 'unknown policy'))],
            () => { open = isOpen ? null : step.id; active = lane.id; draw({ step: step.id, act: 'open' }); }, { class: 'pe-open', 'data-act': 'open', 'aria-expanded': String(isOpen), 'aria-controls': isOpen ? id : false, 'aria-label': `Settings of ${title}, ${place}` }),
          el('span', { class: 'pe-stage' }, card?.stage || '?'),
          button('✕', () => remove(step.id), { class: 'pe-icon', 'data-act': 'remove', 'aria-label': `Remove ${title} from ${laneTitle(lane)}` })),
        isOpen && card ? el('div', { class: 'pe-form', id }, PS.stepForm(step, card, {
          set: (name, value) => { state.setKnob(step.id, name, value); knobChanged(step); },
          sweep: (name, values) => {
            const left = state.sweep(step.id, name, values);
            open = null;
            active = state.lanes[0].id;
            changed(null, left ? `${values.length - left} lanes made; there is no room for ${left} more` : `${values.length} lanes made, one per value of ${name}`);
          },
        })) : null);
    }
    // The form keeps its own inputs while one types; only the summary line and the checks are redrawn.
    function knobChanged(step) {
      props.value = { lanes: state.export(), rev: ++rev };
      const line = root.querySelector(`[data-step="${step.id}"] .pe-knobs`);
      if (line) line.textContent = PS.knobText(step) || 'defaults';
      check();
    }
    function drawShelf() {
      const chip = (pipeline, own) => el('span', { class: 'pe-chip' },
        button(pipeline.name, () => {
          [pipeline, ...(pipeline.beside || [])].forEach((p) => load({ ...p, name: p.lane || p.name }, p.name));
          if (pipeline.families) trigger('edit', { field: 'start', value: { families: pipeline.families, bound: pipeline.bound === true, model: pipeline.model, workload: pipeline.workload } });
        }, { class: 'pe-small', title: pipeline.about || '' }),
        own ? button('✕', () => forget(pipeline.name), { class: 'pe-icon pe-forget', 'aria-label': `Forget ${pipeline.name}` }) : null);
      places.shelf.replaceChildren(
        el('span', { class: 'ps-label' }, 'Examples'), ...props.examples.map((p) => chip(p, false)),
        ...(saved.length ? [el('span', { class: 'ps-label' }, 'Saved'), ...saved.map((p) => chip(p, true))] : []));
    }

    // ---- keys ----
    root.addEventListener('keydown', (e) => {
      const row = e.target.closest('[data-step]');
      if (!row || !['grab', 'open'].includes(e.target.dataset.act)) return;
      const id = row.dataset.step, here = state.find(id), title = state.title(here.step.policy), focus = { step: id, act: 'grab' };
      const stop = () => e.preventDefault();
      if (e.key === 'Delete') { stop(); grabbed = null; return remove(id); }
      if (e.target.dataset.act !== 'grab') return;
      if (e.key === ' ' || e.key === 'Enter') {
        stop();
        if (grabbed) { grabbed = null; draw(focus); return say(`${title} dropped at ${where(here.lane, here.at)}`); }
        grabbed = { id, lane: here.lane.id, at: here.at };
        draw(focus);
        return say(`${title} grabbed. Up and down move it within its stage, left and right to another lane, space drops, escape cancels.`);
      }
      if (e.key === 'Escape' && grabbed) { stop(); const back = grabbed; grabbed = null; state.move(id, back.lane, back.at); return changed(focus, 'Move cancelled'); }
      if (e.key === 'Tab' && grabbed) { grabbed = null; return draw(); }
      const step = { ArrowUp: -1, ArrowDown: 1 }[e.key], side = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (!step && !side) return;
      stop();
      if (!grabbed && !e.altKey) {
        const handles = [...root.querySelectorAll('[data-step] [data-act=grab]')];
        return handles[handles.indexOf(e.target) + (step || side)]?.focus();
      }
      if (step) return move(id, here.lane.id, here.at + step, focus);
      const next = state.lanes[state.lanes.indexOf(here.lane) + side];
      if (next) move(id, next.id, Infinity, focus); else say('There is no lane on that side');
    });
    root.addEventListener('click', (e) => { if (e.target.dataset.act === 'grab' && e.detail === 0) e.preventDefault(); });
    search.addEventListener('input', drawPalette);

    // ---- pointer ----
    const dragger = PS.dragging(root, {
      source: (target, kind) => {
        const node = target.closest('[data-policy], [data-step] .pe-row');
        if (!node || target.closest('.pe-form, input')) return null;
        if (kind === 'touch' ? !target.closest('.pe-handle') : target.closest('.pe-icon')) return null;
        const row = node.closest('[data-step]');
        return row ? { node: row, id: row.dataset.step, policy: state.find(row.dataset.step).step.policy } : { node, policy: node.dataset.policy };
      },
      place: (lane, before, what) => {
        const [first, last] = state.legal(state.laneOf(lane.dataset.lane).steps.filter((s) => s.id !== what.id), what.policy);
        return Math.max(first, Math.min(last, before));
      },
      drop: (what, lane, at) => (what.id ? move(what.id, lane.dataset.lane, at) : add(what.policy, lane.dataset.lane, at)),
    });

    // ---- values from Python ----
    const pull = () => { state.replace(props.value?.lanes || []); open = null; active = state.lanes[0].id; draw(); check(); };
    watch('value', () => { if (props.value?.rev === undefined) pull(); });      // no rev: Python replaces the pipelines
    watch('setup', check);
    drawShelf();
    server.saved_pipelines({}).then((answer) => { saved = answer.saved; drawShelf(); });
    pull();
    root.dataset.ready = '1';
  };
})();
