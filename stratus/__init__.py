"""The commands of users and hypervisors: a client of the service's API that needs nothing of the service."""
