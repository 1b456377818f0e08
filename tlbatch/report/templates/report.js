const filters = document.getElementById('filters');
if (filters) {
  const figures = [...document.querySelectorAll('.gallery figure')];
  const holders = [...document.querySelectorAll('.gallery .reason'), ...document.querySelectorAll('.gallery .group')];
  filters.addEventListener('submit', event => event.preventDefault());
  filters.addEventListener('change', () => {
    const label = filters.elements.label.value, why = filters.elements.why.value;
    for (const figure of figures) {
      figure.hidden = (label && figure.dataset.label !== label) || (why && figure.dataset.why !== why);
    }
    for (const holder of holders) {
      holder.hidden = !holder.querySelector('figure:not([hidden])');
    }
    filters.querySelector('output').textContent = figures.filter(figure => !figure.hidden).length + ' images';
  });
}
const cells = [...document.querySelectorAll('.matrix button')];
const open = wanted => {
  for (const cell of cells) {
    const shown = cell === wanted && cell.getAttribute('aria-expanded') !== 'true';
    cell.setAttribute('aria-expanded', String(shown));
    document.getElementById(cell.getAttribute('aria-controls')).hidden = !shown;
  }
};
for (const cell of cells) {
  cell.addEventListener('click', () => open(cell));
}
document.addEventListener('keydown', event => {
  const cell = cells.find(one => one.getAttribute('aria-expanded') === 'true');
  if (event.key === 'Escape' && cell) {
    open(null);
    cell.focus();
  }
});
