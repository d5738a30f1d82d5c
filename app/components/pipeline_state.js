// The pipelines of an experiment and all that can be done to them. No DOM in here.
// lanes = [{id, name, steps: [{id, policy, knobs}]}]; steps always stand in stage order, so what
// is seen is the order in which the policies act. The baseline is not in the list.
(() => {
  const PS = window.ParetoStudio;
  const UNDO_STEPS = 50;

  PS.pipelines = (catalog, most) => {
    const cards = Object.fromEntries(catalog.cards.map((card) => [card.id, card]));
    let lanes = [newLane()], past = [];

    function newLane(pipeline) {
      const { name = '', steps = [], ...rest } = structuredClone(pipeline || {});
      return { ...rest, id: PS.uid('l'), name, steps: sorted(steps.map((s) => ({ knobs: {}, ...s, id: PS.uid('s') }))) };
    }
    const rank = (policy) => (cards[policy] ? catalog.stages.indexOf(cards[policy].stage) : catalog.stages.length);
    function sorted(steps) { return steps.map((s, i) => [s, i]).sort(([a, i], [b, j]) => rank(a.policy) - rank(b.policy) || i - j).map(([s]) => s); }
    const title = (policy) => cards[policy]?.title || policy;
    const find = (stepId) => {
      for (const lane of lanes) {
        const at = lane.steps.findIndex((s) => s.id === stepId);
        if (at >= 0) return { lane, at, step: lane.steps[at], number: lanes.indexOf(lane) + 1 };
      }
      return null;
    };
    const laneOf = (laneId) => lanes.find((lane) => lane.id === laneId);
    const keep = () => { past.push(JSON.stringify(lanes)); if (past.length > UNDO_STEPS) past.shift(); };

    /** Positions at which a policy may stand in these steps: [first, last]. */
    function legal(steps, policy) {
      const mine = rank(policy);
      const first = steps.filter((s) => rank(s.policy) < mine).length;
      return [first, first + steps.filter((s) => rank(s.policy) === mine).length];
    }
    const clamp = (at, [first, last]) => Math.max(first, Math.min(last, at));

    return {
      cards, title, find, laneOf, legal, rank,
      get lanes() { return lanes; },
      get full() { return lanes.length >= most; },
      get canUndo() { return past.length > 0; },
      most,

      /** Put a policy into a lane; returns the step and its place. `at` is moved into its stage. */
      insert(laneId, policy, at = Infinity) {
        keep();
        const lane = laneOf(laneId), step = { id: PS.uid('s'), policy, knobs: {} };
        const place = clamp(at, legal(lane.steps, policy));
        lane.steps.splice(place, 0, step);
        return { step, place, lane };
      },
      /** Move a step, within its stage; returns its new place, or null if it cannot move there. */
      move(stepId, laneId, at) {
        const from = find(stepId), to = laneOf(laneId);
        if (!from || !to) return null;
        const rest = to.steps.filter((s) => s.id !== stepId);
        const place = clamp(at, legal(rest, from.step.policy));
        if (from.lane === to && place === from.at) return null;
        keep();
        from.lane.steps.splice(from.at, 1);
        to.steps.splice(place, 0, from.step);
        return { step: from.step, place, lane: to };
      },
      remove(stepId) {
        const from = find(stepId);
        if (!from) return null;
        keep();
        from.lane.steps.splice(from.at, 1);
        return from;
      },
      setKnob(stepId, name, value) {
        const from = find(stepId);
        if (!from) return;
        keep();
        const { [name]: old, ...rest } = from.step.knobs;
        from.step.knobs = value === undefined ? rest : { ...rest, [name]: value };
      },
      addLane(pipeline, after) {
        if (lanes.length >= most) return null;
        keep();
        const lane = newLane(pipeline);
        lanes.splice(after === undefined ? lanes.length : after + 1, 0, lane);
        return lane;
      },
      copyLane(laneId) {
        const lane = laneOf(laneId);
        return this.addLane({ ...lane, name: lane.name ? `${lane.name} copy` : '' }, lanes.indexOf(lane));
      },
      removeLane(laneId) {
        keep();
        lanes = lanes.filter((lane) => lane.id !== laneId);
        if (!lanes.length) lanes = [newLane()];
      },
      rename(laneId, name) { keep(); laneOf(laneId).name = name.slice(0, 200); },
      /** Fill an empty lane with a pipeline, else open a new one, else replace; returns the lane and what was done. */
      load(pipeline, laneId) {
        const here = laneOf(laneId) || lanes[lanes.length - 1], empty = lanes.find((lane) => !lane.steps.length);
        const target = here && !here.steps.length ? here : empty;
        if (!target && lanes.length < most) return { lane: this.addLane(pipeline), how: 'added as a new lane' };
        keep();
        const old = target || here, lane = newLane(pipeline);
        lanes[lanes.indexOf(old)] = lane;
        return { lane, how: target ? 'put into the empty lane' : 'put in place of the lane (undo brings it back)' };
      },
      /** One lane per value of a knob, in place of the lane; returns how many lanes there is no room for. */
      sweep(stepId, knob, values) {
        const from = find(stepId), others = lanes.length - 1;
        const room = Math.min(values.length, most - others);
        if (!from || room < 1) return values.length;
        keep();
        const made = values.slice(0, room).map((value) => {
          const copy = structuredClone(from.lane);
          copy.steps.find((s) => s.id === stepId).knobs[knob] = value;
          return newLane({ ...copy, name: from.lane.name ? `${from.lane.name}, ${knob} ${value}` : '' });
        });
        lanes.splice(lanes.indexOf(from.lane), 1, ...made);
        return values.length - room;
      },
      undo() { if (past.length) lanes = JSON.parse(past.pop()); },
      /** Replace everything (a link, an example from Python, a reload). */
      replace(pipelines) {
        if (lanes.some((lane) => lane.steps.length)) keep();
        lanes = pipelines.map(newLane);
        if (!lanes.length) lanes = [newLane()];
      },
      export() { return lanes.map(({ id, steps, ...rest }) => ({ ...rest, steps: steps.map(({ id: _, ...step }) => step) })); },
    };
  };

  PS.knobText = (step) => Object.entries(step.knobs).map(([k, v]) => `${k} ${typeof v === 'object' ? JSON.stringify(v) : v}`).join(' · ');
})();
