// Short lists of facts and one-sentence notices, always as text nodes.
(() => {
  const PS = window.ParetoStudio, { el } = PS;

  /** value = {rows: [[label, text]], note, tone} */
  PS.mountFacts = (root, props, watch) => {
    const place = root.querySelector('.ps-facts-place');
    const draw = () => {
      const value = props.value || {};
      place.replaceChildren(
        el('dl', { class: 'ps-facts' }, (value.rows || []).map(([label, text]) => el('div', {}, el('dt', {}, label), el('dd', {}, text)))),
        value.note ? el('p', { class: `ps-note ps-note-${value.tone || 'info'}` }, value.note) : '');
    };
    watch('value', draw);
    draw();
  };

  /** value = {lines: [text], tone}; empty = nothing is shown. */
  PS.mountNotice = (root, props, watch) => {
    const place = root.querySelector('.ps-notice-place');
    const draw = () => {
      const { lines = [], tone = 'info' } = props.value || {};
      place.className = `ps-notice-place ${lines.length ? `ps-note ps-note-${tone}` : ''}`;
      place.replaceChildren(...(lines.length > 1 ? [el('ul', {}, lines.map((line) => el('li', {}, line)))] : lines.map((line) => el('span', {}, line))));
    };
    watch('value', draw);
    draw();
  };

  /** value = {packed}: shows the link, puts it into the address bar and copies it where the browser allows that. */
  PS.mountLink = (root, props, watch) => {
    const place = root.querySelector('.ps-link-place');
    watch('value', async () => {
      const { packed } = props.value || {};
      if (!packed) return;
      const link = new URL(location.href), box = el('input', { type: 'text', readonly: true, 'aria-label': 'Link to this experiment' });
      link.search = '';
      link.searchParams.set('p', packed);
      history.replaceState(null, '', link);
      box.value = link.href;
      const said = el('span', { class: 'ps-quiet', role: 'status' });
      place.replaceChildren(box, said);
      box.select();
      said.textContent = (await PS.copyText(link.href)) ? 'copied' : 'copy it from here';
    });
  };
})();
