// The socket of one tab: token, back-off, and plain requests where WebSockets do not get through.
(() => {
  const PS = window.ParetoStudio;
  const BACK_OFF_MS = [300, 1000, 3000, 8000], POLL_MS = 500, TRIES_BEFORE_POLL = 3, REFUSED = 4403;

  /**
   * @param open   async () -> token
   * @param take   (sections) called with what changed
   * @param state  ('live' | 'polling' | 'lost') called when the way changes
   * @param seen   () -> how far the pictures have come
   */
  PS.liveFeed = (root, { open, take, state, seen }) => {
    let token = null, socket = null, wish = { watch: '', item: null }, failed = 0, opened = false, timer = null;

    const address = (rest) => new URL(`live/${token}${rest}`, document.baseURI.replace(/[?#].*$/, '')).href;
    const ask = () => { if (socket?.readyState === 1) socket.send(JSON.stringify({ ...wish, seen: seen() })); };

    async function connect() {
      clearTimeout(timer);
      if (!root.isConnected) return;
      if (!token) { try { token = await open(); } catch { return again(); } }
      if (failed >= TRIES_BEFORE_POLL && !opened) return poll();
      socket = new WebSocket(address('').replace(/^http/, 'ws'));
      socket.onopen = () => ask();
      socket.onmessage = (e) => { opened = true; failed = 0; state('live'); take(JSON.parse(e.data)); };
      socket.onclose = (e) => { if (e.code === REFUSED) token = null; again(); };
    }
    function again() {
      if (document.hidden) return;                     // comes back when the tab is seen again
      failed += 1;
      state('lost');
      timer = setTimeout(connect, BACK_OFF_MS[Math.min(failed, BACK_OFF_MS.length) - 1]);
    }
    async function poll() {
      if (!root.isConnected) return;
      try {
        const query = new URLSearchParams({ watch: wish.watch, seen: seen(), ...(wish.item === null ? {} : { item: wish.item }) });
        const answer = await fetch(address(`/poll?${query}`));
        if (answer.status === 403) { token = null; return again(); }
        state('polling');
        take(await answer.json());
        timer = setTimeout(poll, POLL_MS);
      } catch { again(); }
    }
    document.addEventListener('visibilitychange', () => {
      if (document.hidden) { clearTimeout(timer); if (socket) { socket.onclose = null; socket.close(); socket = null; } } else if (root.isConnected) connect();
    });
    connect();
    return { watch(experiment, item) { wish = { watch: experiment, item: item ?? null }; ask(); } };
  };
})();
