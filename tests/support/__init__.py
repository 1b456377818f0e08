"""What the tests share besides fixtures: servers, hosts, corpora and builders."""
