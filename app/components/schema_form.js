// A form from a JSON Schema: knobs of a policy, options of a workload, settings of an experiment.
// The server is the judge of values; this only refuses what is not a number or not JSON.
(() => {
  const PS = window.ParetoStudio, { el } = PS;

  const resolve = (schema, root) => (schema.$ref ? { ...root.$defs?.[schema.$ref.split('/').pop()], ...schema } : schema);

  /** {type, enum, optional, ...} of a property, with `anyOf [X, null]` read as an optional X. */
  PS.kindOf = (raw, root) => {
    const schema = resolve(raw, root || {});
    if (!schema.anyOf) return { ...schema, optional: false };
    const solid = schema.anyOf.filter((s) => s.type !== 'null').map((s) => resolve(s, root || {}));
    const optional = solid.length < schema.anyOf.length;
    return solid.length === 1 ? { ...schema, ...solid[0], anyOf: undefined, optional } : { ...schema, type: 'json', optional };
  };

  PS.rangeText = (kind) => {
    const low = kind.minimum ?? kind.exclusiveMinimum, high = kind.maximum ?? kind.exclusiveMaximum;
    if (low !== undefined && high !== undefined) return `${low} to ${high}`;
    if (low !== undefined) return `at least ${low}`;
    return high !== undefined ? `up to ${high}` : '';
  };

  const words = (name, kind) => kind.title || name.replaceAll('_', ' ');
  const shown = (value) => (value === null || value === undefined ? '' : Array.isArray(value) ? value.join(', ') : typeof value === 'object' ? JSON.stringify(value) : String(value));

  /** Read what was typed. Returns [value] or an error sentence. */
  PS.readValue = (text, kind) => {
    const trimmed = text.trim();
    if (trimmed === '' && kind.optional) return [null];
    if (kind.type === 'integer' || kind.type === 'number') {
      const number = Number(trimmed);
      if (trimmed === '' || !Number.isFinite(number)) return 'Write a number.';
      return [number];
    }
    if (kind.type === 'array') return [trimmed === '' ? [] : trimmed.split(',').map((part) => PS.scalar(part.trim(), kind.items?.type))];
    if (kind.type === 'string') return [text];
    try { return [JSON.parse(trimmed)]; } catch { return 'Write JSON, for example {"name": 1}.'; }
  };
  PS.scalar = (text, type) => (type !== 'string' && text !== '' && Number.isFinite(Number(text)) ? Number(text) : text);

  /**
   * Build the form. Fields of a `group` are folded away under its name, unless one of them is set.
   * @param schema JSON Schema with `properties`
   * @param values what is set; the rest shows its default
   * @param onchange (name, value) after each valid change; value undefined = back to the default
   * @param extra (name, kind) -> node placed after a field, or null
   */
  PS.schemaForm = (schema, values, onchange, extra) => {
    const plain = [], groups = new Map();
    for (const [name, raw] of Object.entries(schema.properties || {})) {
      const kind = PS.kindOf(raw, schema), node = field(name, kind, values[name], onchange, extra);
      if (!kind.group) { plain.push(node); continue; }
      if (!groups.has(kind.group)) groups.set(kind.group, { nodes: [], open: false });
      const group = groups.get(kind.group);
      group.nodes.push(node);
      group.open ||= values[name] !== undefined;
    }
    const folded = [...groups].map(([title, { nodes, open }]) => el('details', { class: 'ps-fold', open }, el('summary', {}, title), nodes));
    return plain.length || folded.length ? el('div', { class: 'ps-form' }, plain, folded) : el('p', { class: 'ps-quiet' }, 'Nothing to set.');
  };

  function field(name, kind, given, onchange, extra) {
    const id = PS.uid('f'), value = given === undefined ? kind.default : given;
    const error = el('p', { class: 'ps-field-error', role: 'alert' });
    const set = (next) => { error.textContent = ''; onchange(name, JSON.stringify(next) === JSON.stringify(kind.default) ? undefined : next); };
    const read = (text) => {
      const got = PS.readValue(text, kind);
      if (typeof got === 'string') error.textContent = got; else set(got[0]);
    };
    const help = [kind.description, PS.rangeText(kind)].filter(Boolean).join(' · ');
    const about = el('p', { class: 'ps-help', id: `${id}-help` }, help);
    const control = makeControl(id, name, kind, value, set, read);
    const group = kind.enum && kind.enum.length <= 4;
    const title = group || kind.type === 'boolean' ? null : el('label', { class: 'ps-label', for: id }, words(name, kind));
    return el('div', { class: 'ps-field', 'data-field': name }, title, control, help ? about : null, error, extra ? extra(name, kind) : null);
  }

  function makeControl(id, name, kind, value, set, read) {
    const described = `${id}-help`, label = words(name, kind);
    if (kind.enum && kind.enum.length <= 4) {
      return el('fieldset', { class: 'ps-choice' }, el('legend', { class: 'ps-label' }, label), kind.enum.map((option) => el('label', {},
        el('input', { type: 'radio', name: id, value: shown(option), checked: option === value, on: { change: () => set(option) } }), shown(option) || 'none')));
    }
    if (kind.enum) {
      const select = el('select', { id, 'aria-describedby': described }, kind.enum.map((o) => el('option', { selected: o === value }, shown(o))));
      select.addEventListener('change', () => set(kind.enum[select.selectedIndex]));
      return select;
    }
    if (kind.type === 'boolean') {
      const box = el('input', { type: 'checkbox', id, checked: value === true, on: { change: () => set(box.checked) } });
      return el('label', { class: 'ps-check', for: id }, box, label);
    }
    if (kind.type === 'integer' || kind.type === 'number') return numberControl(id, kind, value, described, label, read);
    const long = kind.type === 'json' || kind.type === 'object' || ['lines', 'textarea'].includes(kind.format) || (kind.maxLength || 0) > 400;
    const box = el(long ? 'textarea' : 'input', { id, rows: long ? 4 : false, type: long ? false : 'text', 'aria-describedby': described, placeholder: kind.optional ? 'automatic' : '', on: { input: () => read(box.value) } });
    box.value = shown(value);
    return box;
  }

  function numberControl(id, kind, value, described, label, read) {
    const low = kind.minimum ?? kind.exclusiveMinimum, high = kind.maximum ?? kind.exclusiveMaximum;
    const step = kind.multipleOf || (kind.type === 'integer' ? 1 : 'any');
    const box = el('input', { type: 'number', id, step, min: kind.minimum, max: kind.maximum, 'aria-describedby': described, placeholder: kind.optional ? 'automatic' : '' });
    box.value = shown(value);
    if (low === undefined || high === undefined || kind.optional || high - low > 600) {
      box.addEventListener('input', () => read(box.value));
      return box;
    }
    const fine = kind.type === 'integer' ? step : Math.max((high - low) / 100, 0.01);
    const slider = el('input', { type: 'range', min: low, max: high, step: fine, 'aria-label': `${label}, slider` });
    slider.value = value;
    slider.addEventListener('input', () => { box.value = String(Number(Number(slider.value).toPrecision(6))); read(box.value); });
    box.addEventListener('input', () => { slider.value = box.value; read(box.value); });
    return el('div', { class: 'ps-number' }, slider, box);
  }

  /** A form as a component: value = {schema, values, rev}. */
  PS.mountForm = (root, props, trigger, watch) => {
    const place = root.querySelector('.ps-form-place');
    let own = null;
    const draw = () => {
      const value = props.value || {};
      if (own !== null && value.rev === own) return;          // our own edit coming back
      const values = { ...(value.values || {}) };
      place.replaceChildren(PS.schemaForm(value.schema || {}, values, (name, next) => {
        if (next === undefined) delete values[name]; else values[name] = next;
        own = PS.uid('rev');
        props.value = { ...props.value, values: { ...values }, rev: own };
        trigger('input');
      }));
    };
    watch('value', draw);
    draw();
    root.dataset.ready = '1';
  };
})();
