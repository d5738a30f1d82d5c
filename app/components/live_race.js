// One experiment, live: status, a column per lane, charts, the eviction map and the table.
(() => {
  const PS = window.ParetoStudio, { el, button } = PS;
  const WATCHED = 'pareto-studio-watched', { remember, recall } = PS.memory;

  PS.mountRace = (root, props, trigger, watch, server) => {
    const part = (name) => root.querySelector(`.lr-${name}`), say = PS.announcer(part('status'));
    const { owner, host } = PS.visitor();
    let data = {}, watching = '', item = null, spoken = '', lost = 'live', keptLane = null, busy = '';

    const store = PS.pictureStore(), panels = PS.imagePanels(part('images')), drawn = PS.drawnPanel(part('drawn'));
    const looked = () => data.images?.item || data.drawn?.item || null;
    const choose = (id) => { item = id; feed.watch(watching, item); }, gallery = PS.gallery(part('gallery'), choose);

    const feed = PS.liveFeed(root, {
      open: async () => (await server.open_live({ owner, host })).token,
      take({ pictures, ...sections }) {
        data = { ...data, ...sections };
        Object.keys(sections).forEach((name) => dirty.add(name));
        if (pictures && pictures.experiment === watching) arrived(pictures);
        draw();
      },
      state: (how) => { if (how !== lost) { lost = how; dirty.add('head'); draw(); } },
      seen: () => store.upto,
    });
    const SECTIONS = ['head', 'lanes', 'streams', 'images', 'drawn', 'charts', 'kept', 'cache', 'experts', 'table'];
    const dirty = new Set(['jobs', ...SECTIONS]);

    function arrived(pictures) {
      store.take(pictures);
      gallery.take(pictures);
      dirty.add('images');
      if (data.cache?.image?.length) dirty.add('cache');
      if (data.drawn?.item) dirty.add('drawn');
      if (data.streams?.lanes.some((lane) => lane.bars?.length || lane.drawn)) dirty.add('streams');
    }

    function look(experiment, push) {
      if (experiment === watching) return;
      watching = experiment;
      item = null;
      data = { jobs: data.jobs };
      SECTIONS.forEach((name) => dirty.add(name));
      store.clear();
      gallery.clear();
      drawn.clear();
      part('charts').replaceChildren();
      const others = part('jobs').querySelector('details');
      if (others) others.open = false;
      remember(WATCHED, experiment);
      if (push) props.value = { ...props.value, watch: experiment, owner };
      feed.watch(experiment, item);
      draw();
    }
    const draw = PS.framed(() => {
      for (const name of dirty) drawers[name]?.();
      dirty.clear();
    });

    const drawers = {
      jobs() {
        const atWork = (data.jobs || []).filter((j) => j.status === 'running' || j.status === 'queued').map((j) => j.experiment).join();
        if (atWork !== busy) { busy = atWork; trigger('tick'); }
        const jobs = (data.jobs || []).filter((j) => j.experiment !== watching);
        const open = part('jobs').querySelector('details')?.open ?? !watching;
        PS.redraw(part('jobs'), jobs, () => (jobs.length ? [el('details', { class: 'lr-others', open }, el('summary', {}, `Other runs on this studio (${jobs.length})`),
          el('ul', { role: 'list' }, jobs.map((j) => el('li', {}, button(j.title, () => look(j.experiment, true), { class: 'lr-job', 'aria-label': `Watch ${j.title}` }), el('span', { class: 'ps-quiet' }, j.status)))))] : []));
      },
      head() {
        const h = data.head, place = part('head');
        if (!watching || !h) {
          const text = watching ? 'Looking for the run…' : 'Nothing runs yet. Put a policy into a lane, or take an example, then press Run.';
          PS.redraw(place, text, () => [el('p', { class: 'ps-empty' }, text)]);
          return;
        }
        PS.redraw(place, [watching, h.over, h.mine], () => PS.raceHead(h, cancel));
        PS.fillHead(place, h, lost);
        const now = `${h.status}${h.message}`;
        if (now !== spoken) { spoken = now; say(`${h.text}. ${h.message || ''}`); }
        if (h.over && place.dataset.status !== h.status) trigger('stop');      // a new run to judge the time by
        place.dataset.status = h.status;
      },
      lanes() {
        PS.laneColumns(part('lanes'), data, choose);
        gallery.draw(data.lanes || []);
      },
      streams() {
        PS.laneTexts(part('lanes'), part('picker'), data, choose, item, store);
        PS.questionAsked(part('question'), data.images, store, data.streams);
      },
      images() {
        PS.questionAsked(part('question'), data.images, store, data.streams);
        panels(data.images, store);
        gallery.draw(data.lanes || [], looked());
      },
      drawn() {
        drawn.draw(data.drawn, store);
        gallery.draw(data.lanes || [], looked());
      },
      charts() {
        const place = part('charts'), wanted = data.charts || [];
        const figures = wanted.map((c) => PS.chart(c, place.querySelector(`[data-chart="${c.id}"]`)));
        if (figures.some((f, i) => place.children[i] !== f) || place.children.length !== figures.length) place.replaceChildren(...figures);
      },
      kept: () => PS.evictionMap(part('kept'), data.kept, keptLane, (lane) => { keptLane = lane; drawers.kept(); drawers.cache(); }),
      cache: () => PS.cacheMicroscope(part('cache'), data.cache, data.images, store.source(data.cache?.item), keptLane, (lane) => { keptLane = lane; drawers.kept(); drawers.cache(); }),
      experts: () => PS.expertLoad(part('experts'), data.experts),
      why: () => PS.whyNotFaster(part('why'), data.why),
      table: () => PS.raceTable(part('table'), data.table),
    };

    async function cancel() {
      const answer = await server.cancel_run({ experiment: watching, owner, host });
      say(answer.message);
      part('head').append(el('p', { class: 'ps-note ps-note-info' }, answer.message));
    }

    watch('value', () => {
      const value = props.value || {};
      if (value.watch && value.watch !== watching) look(value.watch, false);
      if (value.owner !== owner) props.value = { ...value, owner };
    });
    props.value = { ...(props.value || {}), owner };
    const wanted = new URLSearchParams(location.search).get('e') || props.value.watch || recall(WATCHED);
    if (wanted) look(wanted, true); else draw();
    root.dataset.ready = '1';
  };
})();
