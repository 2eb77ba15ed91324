"""The paper's experiments in small, as a user of ether_diffusion would write them: `make paper-mini`."""
