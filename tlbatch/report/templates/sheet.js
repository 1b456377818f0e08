const quoted = text => /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
const fields = [...document.querySelectorAll('input')];
const filled = () => fields.filter(field => field.value.trim());
const count = () => {
  document.querySelector('output').textContent = filled().length + ' of ' + fields.length;
};
document.addEventListener('input', count);
document.querySelector('button').addEventListener('click', () => {
  const rows = filled().map(field =>
    [field.dataset.uri, field.dataset.key, field.value.trim()].map(quoted).join(',') + '\n');
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob(['uri,key,label\n' + rows.join('')], {type: 'text/csv'}));
  link.download = 'labels.csv';
  link.click();
});
count();
