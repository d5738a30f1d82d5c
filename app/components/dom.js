// Small helpers shared by all components. Text always enters as a text node, never as markup.
window.ParetoStudio = window.ParetoStudio || {};
(() => {
  const PS = window.ParetoStudio;

  /** An element with attributes and children; false and null attributes are left out. */
  PS.el = (tag, attrs, ...children) => fill(document.createElement(tag), attrs, children);
  PS.svg = (tag, attrs, ...children) => fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attrs, children);

  function fill(node, attrs, children) {
    for (const [name, value] of Object.entries(attrs || {})) {
      if (value === false || value === null || value === undefined) continue;
      if (name === 'on') for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
      else node.setAttribute(name, value === true ? '' : value);
    }
    node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
    return node;
  }

  PS.button = (label, onclick, attrs) => PS.el('button', { type: 'button', class: 'ps-button', ...attrs, on: { click: onclick } }, label);

  /** A random name that is hard to guess; works without a secure context. */
  PS.secret = () => [...crypto.getRandomValues(new Uint8Array(18))].map((b) => b.toString(16).padStart(2, '0')).join('');

  const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window: kept for this page only */ } };
  const recall = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  PS.memory = { remember, recall };

  /** Who this browser is: the secret under which it starts runs, and the host's token if it was opened with one. */
  let visitor = null;
  PS.visitor = () => {
    if (visitor) return visitor;
    const OWNER = 'pareto-studio-owner', HOST = 'pareto-studio-host', asked = new URLSearchParams(location.search);
    visitor = { owner: recall(OWNER) || PS.secret(), host: asked.get('host') || recall(HOST) || '' };
    remember(OWNER, visitor.owner);
    if (asked.get('host')) {                                       // kept for this browser, out of the address bar and of links
      remember(HOST, visitor.host);
      asked.delete('host');
      history.replaceState(null, '', `${location.pathname}${asked.size ? `?${asked}` : ''}`);
    }
    return visitor;
  };

  /** A table that scrolls sideways by itself; the first cell of a row heads it. */
  PS.table = (label, head, rows) => PS.el('div', { class: 'dt-scroll', tabindex: 0, role: 'region', 'aria-label': label }, PS.el('table', { class: 'dt' },
    PS.el('thead', {}, PS.el('tr', {}, head.map((h) => PS.el('th', { scope: 'col' }, h)))), PS.el('tbody', {}, rows.map((cells) => PS.el('tr', {}, cells.map((c, i) => PS.el(i ? 'td' : 'th', { scope: i ? false : 'row' }, c)))))));

  let counter = 0;
  PS.uid = (prefix) => `${prefix}${++counter}-${PS.secret().slice(0, 5)}`;

  /** Screen readers hear a text again even if it equals the last one. */
  PS.announcer = (node) => (text) => {
    node.textContent = '';
    requestAnimationFrame(() => { node.textContent = text; });
  };

  /** Lane colour, mark and letter, as given by Python. */
  PS.laneStyle = (lane, style) => {
    const i = lane % style.colours.length;
    return { colour: style.colours[i], mark: style.marks[i], letter: lane === 0 ? '' : String.fromCharCode(64 + lane) };
  };
  PS.laneMark = (style) => PS.el('span', { class: 'ps-mark', style: `color:${style.colour}`, 'aria-hidden': 'true' }, style.mark);

  /** Redraw a place only if what it shows changed: a node that is swapped under a pressed mouse button loses its click. */
  PS.redraw = (place, shown, build) => {
    const now = JSON.stringify(shown);
    if (place.__shown === now) return false;
    place.__shown = now;
    place.replaceChildren(...build().flat().filter(Boolean));
    return true;
  };

  /** Run f at most once per animation frame. */
  PS.framed = (f) => {
    let due = false;
    return () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => { due = false; f(); });
    };
  };

  /** Call f whenever an element gets a size: when it is first shown, and when its tab is opened again. */
  PS.whenShown = (node, f) => {
    let shown = false;
    new ResizeObserver(() => {
      const now = node.offsetWidth > 0;
      if (now && !shown) f();
      shown = now;
    }).observe(node);
  };

  PS.copyText = async (text) => {
    try { await navigator.clipboard.writeText(text); return true; } catch { return false; }
  };
})();
